"""The kernels that jmoe's layers call. They import jax and never jmoe.

Axes in ``matmul``: M rows, K columns in, N columns out, E matrices of a stack, B leading axes. In ``rows``: N
rows of D numbers, M rows of the result, U uses of a row.
"""
