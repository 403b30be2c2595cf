"""From a model directory and settings to a warmed-up engine."""

import dataclasses
import json
import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jax.sharding import Mesh
from jmoe_kernels.choice import choose

from jmoe.checkpoint import load_model
from jmoe.config.model import ModelConfig, MoEConfig
from jmoe.config.reading import named, unique_json
from jmoe.config.techniques import ShuffleConfig
from jmoe.engine.deployment.deployment import Deployment, resolve, within
from jmoe.engine.deployment.settings import BUNDLED, EngineSettings, model_directory
from jmoe.engine.engine import Engine
from jmoe.engine.offload.build import make_cache, pick_executor, read_profile
from jmoe.engine.offload.host_runner import HostDrivenRunner
from jmoe.engine.request import Request, SamplingParams
from jmoe.engine.schedule.admission import Dispatch, Share
from jmoe.engine.schedule.pages import PagePool
from jmoe.engine.schedule.scheduler import Limits, Scheduler
from jmoe.engine.step.runner import Runner
from jmoe.engine.text.codec import load_codec
from jmoe.mesh import DATA, EXPERT, platform_of
from jmoe.models.fields import HFConfig
from jmoe.moe.orders import prompt_share, step_tables
from jmoe.placement.placement import Placement

__all__ = ["BUNDLED", "EngineSettings", "build_engine", "model_directory"]
log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


def end_tokens(directory: Path, cfg: ModelConfig) -> frozenset[int]:
    """End-of-text ids from config.json and generation_config.json."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset(cfg.eos_token_ids)
    try:
        values = unique_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    with named(path):
        if not isinstance(values, dict):
            raise ValueError(f"it must be a JSON object, it is {type(values).__name__}")
        ends = HFConfig(values).get("eos_token_id")
    ends = ends if isinstance(ends, tuple) else () if ends is None else (ends,)
    return frozenset([*cfg.eos_token_ids, *ends])


def build_engine(
    model: str | Path,
    settings: EngineSettings = EngineSettings(),
    progress: Progress = lambda stage, done, total: None,
    *,
    warm_up: bool = True,
    scores_prompts: bool = True,
    make_runner: Callable[..., Runner] | None = None,
) -> Engine:
    """Loads ``model`` (a bundled name or a directory), compiles every shape and returns its engine.

    progress: called with ("kernels", builds done, builds), ("load", bytes done, bytes) and ("compile", shapes
        done, shapes).
    warm_up: if False, each shape compiles when it first runs.
    scores_prompts: if False, the warm-up skips what only ``prompt_logprobs`` needs.
    make_runner: None = the runner that ``settings`` require.
    """
    found = resolve(model, settings)
    for note in found.notes:
        log.warning("%s", note)
    with within(found.memory):
        return _build(found, settings, progress, warm_up, scores_prompts, make_runner)


def _build(
    found: Deployment,
    settings: EngineSettings,
    progress: Progress,
    warm_up: bool,
    scores_prompts: bool,
    make_runner: Callable[..., Runner] | None,
) -> Engine:
    directory, cfg, max_model_len = found.directory, found.cfg, found.max_model_len
    mesh, sizes = found.split.mesh, found.sizes
    progress("kernels", 0, 1)  # the C++ kernels compile on their first use on a machine
    choose(platform_of(mesh), cfg.dtype, settings.moe.kernel)
    progress("kernels", 1, 1)
    codec = load_codec(directory, cfg.vocab_size)
    placement = read_placement(settings.moe.shuffle, cfg, mesh)
    profile = read_profile(settings.moe.offload)
    decoder = load_model(
        directory,
        mesh,
        settings.moe,
        settings.dtype,
        progress=lambda done, total: progress("load", done, total),
        placement=placement,
        context=max_model_len,
    )
    shuffle, tables, share = settings.moe.shuffle, None, None
    if shuffle is not None and placement is not None and placement.tables is not None:
        if shuffle.tokens:
            tables = step_tables(placement.tables, history=shuffle.history)
        if shuffle.requests:
            share = prompt_share(placement.tables, groups=mesh.shape[DATA])
    cache = None
    if settings.moe.offload is not None:
        cache = make_cache(decoder, mesh, sizes.decode[-1], profile, placement)
    make_runner = make_runner or runner_for(settings.moe, mesh)
    runner = make_runner(decoder, mesh, sizes, tables, cache)
    if warm_up:
        runner.warm_up(lambda done, total: progress("compile", done, total), scores_prompts=scores_prompts)
    scheduler = schedule(runner, settings, max_model_len, share)
    return Engine(runner, scheduler, codec, end_tokens(directory, cfg), placement)


def schedule(
    runner: Runner, settings: EngineSettings, max_model_len: int, share: Share | None = None
) -> Scheduler:
    """A scheduler for ``runner``'s shapes."""
    sizes = runner.sizes
    pool = PagePool(runner.ranks, sizes.pages_per_rank, sizes.page_size)
    limits = Limits(sizes.decode[-1], settings.max_num_batched_tokens, max_model_len, settings.max_queue)
    kind = partial(page_kind, runner=runner) if settings.enable_prefix_caching else None
    dispatch = Dispatch(runner.ranks, limits.slots, settings.dispatch, share)
    return Scheduler(pool, limits, sizes.prefill, kind, dispatch)


def page_kind(request: Request, runner: Runner) -> str:
    """What the pages of a request depend on other than its tokens.

    If anything lossy is on, it touches the request's tokens with the settings of the moment. A request that
    opted out has the pages of a lossless engine.
    """
    lossy = None
    if runner.lossy and not request.params.exact:
        lossy = [[dataclasses.asdict(table) for table in runner.moe.stages], runner.capacity_factor]
    return json.dumps([request.params.cache_salt, lossy], sort_keys=True)


def runner_for(moe: MoEConfig, mesh: Mesh) -> type[Runner]:
    """The class that runs the steps of one process."""
    driven = moe.offload is not None and pick_executor(moe.offload, mesh)[0] == "host"
    return HostDrivenRunner if driven else Runner


def read_placement(shuffle: ShuffleConfig | None, cfg: ModelConfig, mesh: Mesh) -> Placement | None:
    """The configured placement; ValueError if it is for another mesh or number of experts.

    ``load_model`` checks that it is for this model.
    """
    if shuffle is None:
        return None
    placement = Placement.load(Path(shuffle.placement))
    placement.check(
        model=placement.model, layers=len(cfg.moe_layers), experts=cfg.num_experts, ranks=mesh.shape[EXPERT]
    )
    if not (shuffle.tokens or shuffle.requests):
        return placement
    if placement.tables is None:
        raise ValueError(f"{shuffle.placement} has no token tables, which moe.shuffle needs: make it anew")
    if (known := placement.tables.ranks_LV.shape[1]) != cfg.vocab_size:
        raise ValueError(
            f"{shuffle.placement} has tables of {known} token ids, the model has {cfg.vocab_size}: "
            "make it anew"
        )
    return placement


def with_seed(params: SamplingParams) -> SamplingParams:
    """``params``, with a random seed if it has none."""
    return params if params.seed is not None else dataclasses.replace(params, seed=random.getrandbits(31))
