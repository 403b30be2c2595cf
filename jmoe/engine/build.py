"""From a model directory and settings to a warmed-up engine."""

import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jmoe.checkpoint.facts import end_tokens
from jmoe.checkpoint.load import load_decoder
from jmoe.engine.deployment.deployment import Deployment, resolve
from jmoe.engine.deployment.needs import within
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.offload.build import make_cache
from jmoe.engine.offload.host_runner import HostDrivenRunner
from jmoe.engine.request import Request
from jmoe.engine.schedule.admission import ExpectedShare, RankChooser
from jmoe.engine.schedule.pages import PagePool
from jmoe.engine.schedule.scheduler import Limits, Scheduler
from jmoe.engine.step.runner import Runner
from jmoe.engine.text.codec import load_codec
from jmoe.mesh import DATA
from jmoe.moe.orders import prompt_share, step_tables

log = logging.getLogger(__name__)
BuildProgress = Callable[[str, int, int], None]


def build_engine(
    model: str | Path,
    settings: EngineSettings = EngineSettings(),
    progress: BuildProgress = lambda stage, done, total: None,
    *,
    warm_up: bool = True,
    scores_prompts: bool = True,
) -> Engine:
    """Loads ``model`` (a bundled name or a directory), compiles every shape and returns its engine.

    progress: see ``build``.
    warm_up: whether shapes compile now; if not, each shape compiles when it first runs.
    scores_prompts: whether the warm-up also compiles what only ``prompt_logprobs`` needs.
    """
    progress("kernels", 0, 1)  # the C++ kernels compile on their first use on a machine
    deployment = resolve(model, settings)
    return build(deployment, progress, warm_up=warm_up, scores_prompts=scores_prompts)


def build(
    deployment: Deployment,
    progress: BuildProgress,
    *,
    warm_up: bool = True,
    scores_prompts: bool = True,
    make_runner: Callable[..., Runner] | None = None,
) -> Engine:
    """Returns the engine of a deployment, with every shape compiled if ``warm_up``.

    progress: function that is called with ("kernels", builds done, builds), ("load", bytes done, bytes) and
        ("compile", shapes done, shapes).
    make_runner: function that makes the runner; None = the runner that the deployment requires.
    """
    progress("kernels", 1, 1)
    for note in deployment.notes:
        log.warning("%s", note)
    if deployment.blueprint.codings:
        log.info("quantised weights: %s", deployment.blueprint.codings)
    with within(deployment.memory):
        codec = load_codec(deployment.source, deployment.cfg.vocab_size)
        runner = load_runner(deployment, progress, make_runner)
        if warm_up:
            compiled = partial(progress, "compile")
            runner.warm_up(compiled, scores_prompts=scores_prompts)
    scheduler = make_scheduler(
        runner, deployment.settings, deployment.max_model_len, request_share(deployment)
    )
    ends = end_tokens(deployment.directory, deployment.cfg)
    return Engine(runner, scheduler, codec, ends, deployment.placement)


def load_runner(
    deployment: Deployment, progress: BuildProgress, make_runner: Callable[..., Runner] | None
) -> Runner:
    """Returns the runner of a deployment, with the model's weights."""
    moe, mesh, placement = deployment.settings.moe, deployment.mesh, deployment.placement
    decoder = load_decoder(
        deployment.source,
        deployment.blueprint,
        placement,
        partial(progress, "load"),
        own_dtypes=deployment.settings.dtype == "auto",
    )
    tables = cache = None
    if moe.shuffle is not None and moe.shuffle.tokens and placement is not None and placement.tables:
        tables = step_tables(placement.tables, history=moe.shuffle.history)
    if moe.offload is not None:
        cache = make_cache(decoder, mesh, deployment.sizes.decode[-1], deployment.profile, placement)
    driven = deployment.executor is not None and deployment.executor[0] == "host"
    make_runner = make_runner or (HostDrivenRunner if driven else Runner)
    return make_runner(decoder, mesh, deployment.sizes, tables, cache)


def request_share(deployment: Deployment) -> ExpectedShare | None:
    """Returns the share of a prompt's assignments on each rank, or None if requests are not distributed by
    it."""
    shuffle, placement = deployment.settings.moe.shuffle, deployment.placement
    if shuffle is None or not shuffle.requests or placement is None or placement.tables is None:
        return None
    return prompt_share(placement.tables, groups=deployment.mesh.shape[DATA])


def make_scheduler(
    runner: Runner, settings: EngineSettings, max_model_len: int, share: ExpectedShare | None = None
) -> Scheduler:
    """Makes a scheduler for ``runner``'s shapes."""
    sizes = runner.sizes
    pool = PagePool(runner.ranks, sizes.pages_per_rank, sizes.page_size)
    limits = Limits(sizes.decode[-1], settings.max_num_batched_tokens, max_model_len, settings.max_queue)
    kind = partial(page_kind, runner=runner) if settings.enable_prefix_caching else None
    chooser = RankChooser(runner.ranks, limits.max_num_seqs, settings.dispatch, share)
    return Scheduler(pool, limits, sizes.prefill, kind, chooser)


def page_kind(request: Request, runner: Runner) -> str:
    """Names what the pages of a request depend on other than its tokens.

    If a lossy technique is on, the pages depend on its settings of the moment. The pages of a request that
    opted out are those of a lossless engine. How the keys and values are kept is named too.
    """
    lossy = None
    if runner.is_lossy and not request.params.exact:
        lossy = [[dataclasses.asdict(table) for table in runner.moe.stages], runner.knobs]
    return json.dumps([request.params.cache_salt, lossy, runner.cfg.kv_cache_dtype], sort_keys=True)
