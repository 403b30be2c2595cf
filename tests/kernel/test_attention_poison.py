"""Numbers that are not finite stay with the requests that see them, wherever they lie in the pages.

Of two sequences the first is healthy. What it may not see is overwritten with NaN or infinity; then its
outputs must equal those of clean memory, bit for bit. What it does see must show in them.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels import cpu
from jmoe_kernels.paged_attention import LayerPages, NewTokens, Span, attend_all
from support.paged_attention import interpreted_gpu

from jmoe.nn.uncached import attend_uncached

SIZE, PAGES, TABLE, RUN = 8, 32, 12, 16  # rows of a page, pages, pages of a table, tokens of a prompt's row
OWN, MATE = [3, 9, 7, 12, 5, 14], [2, 20, 4, 21, 6, 22, 8, 23, 10, 24]  # pages of both; 0 pads the tables
needs_library = pytest.mark.skipif(
    cpu.why_missing() is not None, reason=f"no C++ kernels here: {cpu.why_missing()}"
)


@dataclass(frozen=True)
class Kind:
    """A kind of layer."""

    span: Span
    sinks: bool = False
    latent: bool = False


KINDS = {
    "plain": Kind(Span()),
    "sinks": Kind(Span(), sinks=True),
    "window": Kind(Span(window=11)),
    "chunk": Kind(Span(chunk=12)),
    "latent": Kind(Span(), latent=True),
    "all": Kind(Span(window=11), sinks=True),
}
# by step: positions of the healthy sequence, positions of its mate, tokens of a row
STEPS = {
    "decode": (range(44, 45), range(75, 76), 1),
    "prompt": (range(13), range(16), RUN),
    "continued": (range(24, 37), range(64, 80), RUN),
}
HERE = [
    ("xla", jnp.float32),
    pytest.param("cpu", jnp.float32, marks=needs_library),
    pytest.param("cpu", jnp.uint16, marks=needs_library),
]


def rows_of(positions: range, t: int) -> np.ndarray:
    return np.array([*positions, *[-1] * (t - len(positions))], np.int32)


@dataclass(frozen=True)
class Case:
    """Pages and new tokens of both sequences.

    k: pages of keys, ``[P, G, S, d]``.
    v: pages of values, likewise.
    pieces: new tokens of both sequences.
    positions: positions of the healthy sequence's new tokens.
    """

    k: np.ndarray
    v: np.ndarray
    pieces: tuple[NewTokens, ...]
    positions: range


@cache
def case(step: str, dim: int = 8) -> Case:
    """Returns the case of a step.

    In "mixed" the healthy sequence decodes in the same step as its mate's prompt.
    """
    rng = np.random.default_rng(7)
    k, v = (rng.standard_normal((PAGES, 2, SIZE, dim)).astype(np.float32) for _ in range(2))
    tables = np.zeros((2, TABLE), np.int32)
    tables[0, : len(OWN)], tables[1, : len(MATE)] = OWN, MATE

    def piece(positions_BT: np.ndarray, table_BM: np.ndarray) -> NewTokens:
        shape = positions_BT.shape
        q, k, v = (rng.standard_normal((*shape, h, dim)).astype(np.float32) for h in (4, 2, 2))
        return NewTokens(q, k, v, positions_BT, table_BM)

    if step == "mixed":
        own, _, _ = STEPS["decode"]
        decode = piece(rows_of(own, 1)[None], tables[:1])
        return Case(k, v, (piece(rows_of(STEPS["continued"][1], RUN)[None], tables[1:]), decode), own)
    own, mate, t = STEPS[step]
    return Case(k, v, (piece(np.stack([rows_of(own, t), rows_of(mate, t)]), tables),), own)


def poisoned(case: Case, place: str, bad: float) -> Case:
    """Returns ``case`` with ``bad`` in ``place``, which the healthy sequence may not see."""
    k, v, last, pieces = case.k.copy(), case.v.copy(), case.positions[-1], list(case.pieces)
    if place == "after":  # in the sequence's last page, and its pages after that one
        for pages in (k, v):
            pages[OWN[last // SIZE], :, last % SIZE + 1 :] = bad
            pages[OWN[last // SIZE + 1 :]] = bad
    elif place == "page 0":
        k[0], v[0] = bad, bad
    elif place == "others":  # the mate's pages, and pages that were freed
        theirs = [page for page in range(PAGES) if page not in OWN]
        k[theirs], v[theirs] = bad, bad
    elif place == "before":  # the first query of the step sees 11 or 12 back at most
        for position in range(max(0, case.positions[0] - 11)):
            k[OWN[position // SIZE], :, position % SIZE] = bad
            v[OWN[position // SIZE], :, position % SIZE] = bad
    else:
        nth = 0 if place == "mate's tokens" else -1
        new = pieces[nth]
        q, new_k, new_v = (np.array(a) for a in (new.q_BTHd, new.k_BTGd, new.v_BTGd))
        at = np.zeros(new.positions_BT.shape, bool)
        if place == "mate's tokens":
            at[len(pieces) == 1 :] = True
        elif place == "padding":
            at = new.positions_BT < 0
        else:  # the last of its own tokens, which the earlier ones do not see
            at[0, len(case.positions) - 1] = True
        for a in (q, new_k, new_v):
            a[at] = bad
        pieces[nth] = NewTokens(q, new_k, new_v, new.positions_BT, new.table_BM)
    return Case(k, v, tuple(pieces), case.positions)


@cache
def attention(name: str, kind: Kind):
    sinks = jnp.linspace(-1.0, 1.0, 4) if kind.sinks else None
    if name == "gpu":
        run = jax.jit(interpreted_gpu)
        return lambda pieces, pages: [run(new, pages)[0] for new in pieces]
    return jax.jit(lambda pieces, pages: attend_all(name, pieces, pages, kind.span, sinks)[0])


def outputs(name: str, kind: Kind, dtype, case: Case) -> np.ndarray:
    """Returns the healthy sequence's outputs, ``[tokens, H, d]``; checks that those of padding are zero."""

    def kept(pages: np.ndarray) -> jax.Array:
        if dtype == jnp.float32:
            return jnp.asarray(pages)
        half = jnp.asarray(pages).astype(jnp.bfloat16)
        return half if dtype == jnp.bfloat16 else jax.lax.bitcast_convert_type(half, dtype)

    pages = LayerPages(tuple(kept(a) for a in ((case.k,) if kind.latent else (case.k, case.v))))
    pieces = [
        NewTokens(p.q_BTHd, p.k_BTGd, None if kind.latent else p.v_BTGd, p.positions_BT, p.table_BM)
        for p in case.pieces
    ]
    outs = [np.asarray(out) for out in attention(name, kind)(pieces, pages)]
    for piece, out in zip(pieces, outs, strict=True):
        assert (out[np.asarray(piece.positions_BT) < 0] == 0).all()
    return outs[-1][0, : len(case.positions)]


PLACES = ("after", "page 0", "others", "mate's tokens", "padding", "last own token")


def check(name: str, kind: Kind, dtype, step: str, dim: int = 8) -> None:
    clean = case(step, dim)
    want = outputs(name, kind, dtype, clean)
    assert np.isfinite(want).all()
    within = kind.span != Span()
    for place in (*PLACES, *(["before"] if within else [])):
        for bad in (np.nan, np.inf, -np.inf):
            got = outputs(name, kind, dtype, poisoned(clean, place, bad))
            whole = len(want) - (place == "last own token")
            np.testing.assert_array_equal(got[:whole], want[:whole], err_msg=f"{place}: {bad}")
            assert whole == len(want) or not np.isfinite(got[whole:]).all(axis=(1, 2)).any(), place


BRIEF = dict(zip(KINDS, ("", "decode", "continued", "continued", "decode", "prompt"), strict=True))


def cells() -> list:
    """Returns every implementation with each kind of layer and step.

    The portable one takes longer to compile. So it has every step of the plain kind, and of each other kind
    one step and, in the long tables, the step with prompts and decoding.
    """
    names = [("xla", jnp.float32), ("cpu", jnp.float32), ("cpu", jnp.uint16)]
    return [
        pytest.param(name, dtype, kind, step, marks=[
            *([needs_library] if name == "cpu" else []),
            *([pytest.mark.matrix] if name == "xla" and kind != "plain" and step == "mixed" else []),
        ])
        for name, dtype in names for kind in KINDS for step in (*STEPS, "mixed")
        if name == "cpu" or kind == "plain" or step in (BRIEF[kind], "mixed")
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "kind", "step"), cells())
def test_nothing_that_a_query_does_not_see_reaches_it(name: str, dtype, kind: str, step: str):
    check(name, KINDS[kind], dtype, step)


@pytest.mark.parametrize("step", STEPS)
def test_nor_on_a_gpu(step: str):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        check("gpu", KINDS["plain"], jnp.bfloat16, step, dim=16)


@pytest.mark.parametrize(("name", "dtype"), HERE)
@pytest.mark.parametrize("step", STEPS)
def test_what_a_query_sees_shows(name: str, dtype, step: str):
    """The values of the sequence's first token are NaN, in the pages or as new values: no query is spared."""
    clean = case(step)
    new, pages_v = clean.pieces[0], clean.v.copy()
    pages_v[OWN[0], :, 0] = np.nan
    v = np.array(new.v_BTGd)
    v[0, 0] = np.nan if step == "prompt" else v[0, 0]
    new = NewTokens(new.q_BTHd, new.k_BTGd, v, new.positions_BT, new.table_BM)
    assert not np.isfinite(
        outputs(name, KINDS["plain"], dtype, Case(clean.k, pages_v, (new,), clean.positions))
    ).any()


@pytest.mark.parametrize("span", [Span(), Span(window=5), Span(chunk=6)], ids=str)
def test_windows_without_a_cache_keep_it_to_themselves(span: Span):
    """Padding, another window of the batch, or the last token is broken: other outputs do not change."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 20, h, 8)).astype(np.float32) for h in (4, 2, 2))
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20)).copy()
    positions[0, 15:] = -1
    run = jax.jit(lambda q, k, v: attend_uncached(q, k, v, positions, span, jnp.ones(4)))
    want = np.asarray(run(q, k, v))
    for at in ((0, slice(15, None)), (1, slice(None)), (0, slice(14, 15))):
        for bad in (np.nan, np.inf):
            spoilt = [np.array(a) for a in (q, k, v)]
            for a in spoilt:
                a[at] = bad
            np.testing.assert_array_equal(np.asarray(run(*spoilt))[0, :14], want[0, :14])
