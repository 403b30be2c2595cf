"""The shapes that an engine compiles, and how many pages its KV cache has."""

import math

import jax
from jmoe_kernels.backends import get_backend

from jmoe.config.model import ModelConfig
from jmoe.config.units import readable
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.step.inputs import Sizes
from jmoe.mesh import EXPERT, Split, platform_of
from jmoe.nn.kinds import page_bytes

PAGE_SIZE = 32  # tokens
DEFAULT_KV_BYTES = 2 << 30


def fit_pages(
    cfg: ModelConfig, settings: EngineSettings, split: Split, length: int, free_bytes: int | None
) -> tuple[int, int, list[str]]:
    """Returns (tokens of a context, pages of a rank, notes); raises ValueError if the context must shrink and
    may not.

    free_bytes: bytes that all but the pages leave of a device's memory; None if unknown.
    """
    one_page, table = page_bytes(cfg, split, PAGE_SIZE), -(-length // PAGE_SIZE)
    if settings.kv_memory is not None:
        pages, source = settings.kv_memory // one_page, f"kv_memory {readable(settings.kv_memory)}"
        if pages < 1:
            raise ValueError(
                f"kv_memory {settings.kv_memory} bytes holds no page; one takes {one_page} bytes"
            )
    else:
        pages, source = rank_seats(settings, split)[0] * table, "half of what the rest leaves of the memory"
        pages = max(table, min(pages, DEFAULT_KV_BYTES // one_page))
        if free_bytes is not None and jax.process_count() == 1:
            pages = min(pages, free_bytes // 2 * split.head_ranks // one_page)
    if pages >= table:
        return length, pages, []
    lack = (
        f"a context of {length} tokens (max_model_len) needs a KV cache of {readable(table * one_page)} on "
        f"each rank, and {source} holds {pages * PAGE_SIZE} tokens"
    )
    if settings.kv_memory is None:
        fits = f"max_model_len {pages * PAGE_SIZE} fits" if pages > 0 else "not one page fits"
        raise ValueError(f"{lack}: {fits}")
    if settings.max_model_len is not None:
        raise ValueError(f"{lack}: lower max_model_len or raise kv_memory")
    note = f"{lack}: the context is shortened to them; set max_model_len or kv_memory"
    return pages * PAGE_SIZE, pages, [note]


def sizes_for(settings: EngineSettings, split: Split, max_model_len: int, pages: int) -> Sizes:
    """Returns the shapes to compile: 1, 4, 8, 16 ... sequences; 1, 2, 4, 8 ... rows of prompts' tokens.

    Both are multiples of the number of ranks that share the heads of a sequence and split its tokens.
    """
    seats, sharing = rank_seats(settings, split)
    step, row = math.lcm(PAGE_SIZE, sharing), get_backend(platform_of(split.mesh)).num_row_tokens
    most = round_up(max(PAGE_SIZE, settings.max_num_batched_tokens), step)
    run = min(round_up(row, step), most, round_up(max_model_len, step))
    rows = min(-(-most // run), seats * -(-max_model_len // run))
    decode = {*_steps(1, min(4, seats), 4), *_steps(min(4, seats), seats, 2)}
    return Sizes(
        tuple(sorted({round_up(n, sharing) for n in decode})),
        tuple(count * run for count in _steps(1, rows, 2)),
        PAGE_SIZE, pages, -(-max_model_len // PAGE_SIZE),
    )  # fmt: skip


def rank_seats(settings: EngineSettings, split: Split) -> tuple[int, int]:
    """Returns the number of sequences that run on a rank at once, and of the ranks that share the tokens of
    each."""
    sharing = split.mesh.shape[EXPERT] if EXPERT in split.heads else 1
    return round_up(-(-settings.max_num_seqs // split.sequence_ranks), sharing), sharing


def context_length(cfg: ModelConfig, requested: int | None) -> int:
    """Returns ``requested``, or the model's own; raises ValueError if it is less than 1 or more than the
    model's."""
    limit = cfg.longest_context
    if requested is not None and not 1 <= requested <= limit:
        raise ValueError(f"max_model_len must be between 1 and the model's {limit}, got {requested}")
    return requested or limit


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _steps(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)
