"""From a model directory and settings to a warmed-up engine."""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh
from jmoe_kernels.choice import choose

from jmoe.checkpoint import load_model, read_config
from jmoe.config import ModelConfig, MoEConfig
from jmoe.engine.dispatch import REASONS, Dispatch, Reason, Share
from jmoe.engine.engine import Engine
from jmoe.engine.host_driven import HostDrivenRunner
from jmoe.engine.offload import make_cache, pick_executor, read_profile
from jmoe.engine.pages import PagePool
from jmoe.engine.request import Request, SamplingParams
from jmoe.engine.runner import Runner
from jmoe.engine.scheduler import Limits, Scheduler
from jmoe.engine.step_input import Sizes
from jmoe.engine.text import load_codec
from jmoe.mesh import DATA, EXPERT, Split, make_mesh, platform_of, split_attention
from jmoe.moe.orders import prompt_share, step_tables
from jmoe.moe.placement import Placement
from jmoe.nn.kv_cache import page_bytes
from jmoe.techniques import ShuffleConfig

Progress = Callable[[str, int, int], None]
PAGE_SIZE = 32  # tokens
# Tokens of a row of a prompt: few pad little; on a GPU attention reads a row's whole page table (``gpu.py``).
ROW = {"cpu": 64, "tpu": 64, "gpu": 256}
DEFAULT_KV_BYTES = 2 << 30

BUNDLED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}


@dataclass(frozen=True)
class EngineSettings:
    """How to run a model. Sizes: sequences (max_num_seqs), tokens (max_model_len, max_num_batched_tokens),
    bytes (kv_memory, on each rank). None means: the model's, or as much as the others need.

    max_num_batched_tokens: what a step holds on each rank: a token of every request that is decoded, and of a
    prompt what is left, at least one page; a longer prompt takes several steps. enable_prefix_caching:
    prompts that begin alike share pages. dispatch: what says which rank a request goes to, the first one
    first (see ``scheduler``).
    """

    max_model_len: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    tensor_parallel_size: int = 1
    attention: Literal["dp", "tp"] = "dp"
    moe: MoEConfig = field(default_factory=MoEConfig)
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 1024
    max_queue: int = 1024
    kv_memory: int | None = None
    enable_prefix_caching: bool = True
    dispatch: tuple[Reason, ...] = REASONS

    def __post_init__(self) -> None:
        if self.moe.attention not in ("dp", self.attention):
            raise ValueError(f"attention is {self.attention!r} here and {self.moe.attention!r} in moe")
        object.__setattr__(self, "moe", dataclasses.replace(self.moe, attention=self.attention))
        self.moe.check_serves()
        if self.moe.shuffle is not None:
            self.moe.shuffle.check_attention(self.attention)
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unknown = next((reason for reason in self.dispatch if reason not in REASONS), None)
        if unknown is not None or len(set(self.dispatch)) < len(self.dispatch):
            raise ValueError(f"dispatch names some of {', '.join(REASONS)}, each once; got {self.dispatch}")


def model_directory(model: str | Path) -> Path:
    """The directory of a bundled model's name or of a path."""
    return BUNDLED.get(str(model), Path(model))


def sizes_for(cfg: ModelConfig, settings: EngineSettings, max_model_len: int) -> Sizes:
    """Shapes to compile: 1, 4, 8, 16 ... sequences; 1, 2, 4, 8 ... rows of prompts' tokens.

    Both are multiples of the ranks that share heads of a sequence and split its tokens.
    """
    split = settings_split(settings)
    sharing = split.mesh.shape[EXPERT] if EXPERT in split.heads else 1
    slots = round_up(-(-settings.max_num_seqs // split.sequence_ranks), sharing)
    step, row = math.lcm(PAGE_SIZE, sharing), ROW[platform_of(split.mesh)]
    most = round_up(max(PAGE_SIZE, settings.max_num_batched_tokens), step)
    run = min(round_up(row, step), most, round_up(max_model_len, step))
    rows = min(-(-most // run), slots * -(-max_model_len // run))
    table = -(-max_model_len // PAGE_SIZE)
    one_page = page_bytes(cfg, split, PAGE_SIZE)
    if settings.kv_memory is None:
        pages = max(table, min(slots * table, DEFAULT_KV_BYTES // one_page))
    else:
        pages = settings.kv_memory // one_page
        if pages < 1:
            raise ValueError(
                f"kv_memory {settings.kv_memory} bytes holds no page; one takes {one_page} bytes"
            )
    decode = {*_steps(1, min(4, slots), 4), *_steps(min(4, slots), slots, 2)}
    return Sizes(
        tuple(sorted({round_up(n, sharing) for n in decode})),
        tuple(count * run for count in _steps(1, rows, 2)),
        PAGE_SIZE, pages, table,
    )  # fmt: skip


def settings_split(settings: EngineSettings) -> Split:
    """The mesh of the settings' sizes, and attention over it."""
    sizes = settings.data_parallel_size, settings.expert_parallel_size, settings.tensor_parallel_size
    return split_attention(make_mesh(*sizes), settings.attention)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _steps(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)


def context_length(cfg: ModelConfig, asked: int | None) -> int:
    """``asked`` or the model's; ValueError where more than the model's is asked."""
    limit = cfg.longest_context
    if asked is not None and not 1 <= asked <= limit:
        raise ValueError(f"max_model_len must be between 1 and the model's {limit}, got {asked}")
    return asked or limit


def end_tokens(directory: Path, cfg: ModelConfig) -> frozenset[int]:
    """End-of-text ids from config.json and generation_config.json."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset(cfg.eos_token_ids)
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, got {str(ends)[:100]}")
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

    warm_up: False leaves each shape to compile when it first runs. scores_prompts: False leaves only what
    ``prompt_logprobs`` needs. make_runner: None takes what ``settings`` say.
    progress: called with ("kernels", builds done, builds), ("load", bytes done, bytes) and ("compile", shapes
    done, shapes).
    """
    directory = model_directory(model)
    cfg = read_config(directory, settings.dtype)
    max_model_len = context_length(cfg, settings.max_model_len)
    mesh = settings_split(settings).mesh
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
    sizes = sizes_for(decoder.cfg, settings, max_model_len)
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
    """A scheduler of ``runner``'s shapes."""
    sizes = runner.sizes
    pool = PagePool(runner.ranks, sizes.pages_per_rank, sizes.page_size)
    limits = Limits(sizes.decode[-1], settings.max_num_batched_tokens, max_model_len, settings.max_queue)
    kind = partial(page_kind, runner=runner) if settings.enable_prefix_caching else None
    dispatch = Dispatch(runner.ranks, limits.slots, settings.dispatch, share)
    return Scheduler(pool, limits, sizes.prefill, kind, dispatch)


def page_kind(request: Request, runner: Runner) -> str:
    """What the pages of a request depend on beside its tokens.

    Where anything lossy is on, its tokens were touched by it, as it is set at the moment; unless the request
    opted out, whose pages are those of a lossless engine.
    """
    lossy = None
    if runner.lossy and not request.params.exact:
        moe = runner.moe
        techniques = [dataclasses.asdict(t) for t in (moe.binning, moe.capacity) if t is not None]
        lossy = [techniques, runner.capacity_factor]
    return json.dumps([request.params.cache_salt, lossy], sort_keys=True)


def runner_for(moe: MoEConfig, mesh: Mesh) -> type[Runner]:
    """What runs the steps of one process."""
    driven = moe.offload is not None and pick_executor(moe.offload, mesh)[0] == "host"
    return HostDrivenRunner if driven else Runner


def read_placement(shuffle: ShuffleConfig | None, cfg: ModelConfig, mesh: Mesh) -> Placement | None:
    """The placement that is configured; ValueError where it is for another mesh or number of experts.

    That it is for this model ``load_model`` finds.
    """
    if shuffle is None:
        return None
    placement = Placement.load(Path(shuffle.placement))
    placement.check(
        model=placement.model, layers=len(cfg.moe_layers), experts=cfg.num_experts, ranks=mesh.shape[EXPERT]
    )
    if (shuffle.tokens or shuffle.requests) and placement.tables is None:
        raise ValueError(f"{shuffle.placement} has no token tables, which moe.shuffle needs: make it anew")
    return placement


def with_seed(params: SamplingParams) -> SamplingParams:
    """``params`` with a seed drawn where it has none."""
    return params if params.seed is not None else dataclasses.replace(params, seed=random.getrandbits(31))
