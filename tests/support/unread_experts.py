"""Runs the CPU's experts with weights of some on pages that cannot be read: whoever reads them dies.

python tests/support/unread_experts.py RUN FORBIDDEN     two lists of expert ids, such as 1,4 and 0,2,3
"""

import ctypes
import mmap
import sys

import jax
import numpy as np
from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.moe.experts import ExpertMath
from jmoe.moe.routing import plan_dispatch

EXPERTS, INNER, MODEL, TOKENS, K = 8, 64, 64, 6, 2  # an expert's matrices are whole pages
PROT_NONE, PROT_READ = 0, 1


def paged(*shape: int) -> np.ndarray:
    """Returns bfloat16 weights, as uint16, that begin at a page of memory."""
    memory = mmap.mmap(-1, 2 * int(np.prod(shape)))
    array = np.frombuffer(memory, np.uint16).reshape(shape)
    array[:] = np.random.default_rng(0).integers(0x3C00, 0x3D00, shape)  # small positive numbers
    return array


def protect(array: np.ndarray, expert: int, access: int) -> None:
    libc, start = ctypes.CDLL(None, use_errno=True), array[expert].ctypes.data
    assert start % mmap.PAGESIZE == array[expert].nbytes % mmap.PAGESIZE == 0
    if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(array[expert].nbytes), access):
        raise OSError(ctypes.get_errno(), "mprotect")


def main(run: list[int], forbidden: list[int]) -> None:
    assert isinstance(cpu.get_library(), cpu.Library)
    arrays = paged(EXPERTS, 2, INNER, MODEL), paged(EXPERTS, MODEL, INNER)
    weights = ExpertWeights(*(jax.device_put(a, may_alias=True) for a in arrays))
    for array, given in zip(arrays, (weights.gate_up_E2FD, weights.down_EDF), strict=True):
        assert given.unsafe_buffer_pointer() == array.ctypes.data, "the weights were copied"
    ids_TK = np.resize(np.array(run, np.int32), (TOKENS, K))

    @jax.jit
    def step(x_TD, ids_TK, weights):
        plan = plan_dispatch(ids_TK, np.ones(TOKENS, bool), 0, EXPERTS)
        return ExpertMath("cpu")(x_TD, np.full((TOKENS, K), 0.5, np.float32), plan, weights)

    x_TD = np.ones((TOKENS, MODEL), np.float32)
    compiled = step.lower(x_TD, ids_TK, weights).compile()
    for array in arrays:
        for expert in forbidden:
            protect(array, expert, PROT_NONE)
    y_TD = np.asarray(compiled(x_TD, ids_TK, weights))
    assert np.isfinite(y_TD).all() and (y_TD > 0).all()
    for array in arrays:
        for expert in forbidden:
            protect(array, expert, PROT_READ)
    print("unread")


if __name__ == "__main__":
    main(*([int(e) for e in given.split(",")] for given in sys.argv[1:]))
