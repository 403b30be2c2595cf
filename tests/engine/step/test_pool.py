"""No step on a CPU reads or writes the whole page pool, by the compiled text, memory and bytes.

The pools here are never allocated: they have gigabytes and the model kilobytes, so that anything of a pool's
size stands out. ``test_pool_aot.py`` has TPUs and GPUs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jmoe_kernels import cpu
from support.aot.pool_cases import DECODE, KINDS, MIXED, Pool, check, compile_pool
from support.aot.pool_text import walks
from support.models.small import mesh_of

needs_library = pytest.mark.skipif(
    isinstance(cpu.get_library(), str), reason=f"no C++ kernels here: {cpu.get_library()}"
)
ONE = (1, 1, 1)


def cells() -> list:
    """Returns every kind of layer with both kernels and in both steps; some run in the long tables.

    Each step and each kind meets each kernel. A kind by a kernel in the other step as well shows nothing new.
    """
    short = {
        ("plain", MIXED, "cpu"),
        ("plain", DECODE, "xla"),
        ("latent", MIXED, "cpu"),
        ("sinks and windows", MIXED, "xla"),
        ("int8", MIXED, "cpu"),
        ("fp8", DECODE, "xla"),
    }
    pairs = [
        (kind, tokens, "cpu" if (tokens == MIXED) != (kind == "sinks and windows") else "xla")
        for kind in KINDS
        for tokens in (DECODE, MIXED)
    ]
    return [
        pytest.param(kind, tokens, kernel, marks=[
            *([needs_library] if kernel == "cpu" else []),
            *([] if (kind, tokens, kernel) in short else [pytest.mark.matrix]),
        ])
        for kind, tokens, kernel in pairs
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "tokens", "kernel"), cells())
def test_a_step_walks_over_no_pool(kind: str, tokens: int, kernel: str):
    check(compile_pool(Pool(kind, tokens, moe={"kernel": kernel}), mesh_of(ONE)), counts=kernel == "cpu")


@pytest.mark.parametrize(
    ("shape", "attention"),
    [pytest.param((2, 2, 2), "dp", marks=pytest.mark.matrix), ((1, 2, 2), "tp")],
    ids=str,
)
def test_nor_does_a_mesh(shape: tuple[int, int, int], attention: str):
    check(compile_pool(Pool(moe={"kernel": "xla", "attention": attention}), mesh_of(shape)), counts=False)


@needs_library
def test_nor_a_step_in_bfloat16_with_offloaded_experts():
    check(compile_pool(Pool(wide=True, moe={"offload": {"slots_per_layer": 4}}), mesh_of(ONE)))


@pytest.mark.parametrize(("kind", "shape"), [("plain", (2, 2, 1)), ("latent", ONE)], ids=str)
def test_nor_the_copy_of_a_page(kind: str, shape: tuple[int, int, int]):
    check(compile_pool(Pool(kind, copies=True), mesh_of(shape)))


@needs_library
def test_eight_times_the_pool_takes_not_a_byte_more():
    small, large = (compile_pool(Pool(pages=pages), mesh_of(ONE)) for pages in (1000, 8000))
    assert (large.temporary, large.moved) == (small.temporary, small.moved)


def test_what_walks_over_a_pool_is_found():
    """An update in place does not walk over it.

    If the old array is needed afterwards, or another array is made of it, the step does.
    """
    pages, row, page = (jnp.zeros((999, 64)), jnp.ones((1, 64)), jnp.int32(7))

    def found(step: Callable) -> list[str]:
        return walks(jax.jit(step, donate_argnums=0).lower(pages, row, page).compile().as_text(), pages.size)

    def update(pages, row, page):
        return jax.lax.dynamic_update_slice(pages, row, (page, jnp.int32(0)))

    assert found(update) == []
    assert found(lambda *args: (update(*args), args[0]))
    assert found(lambda *args: update(*args) * 2)
