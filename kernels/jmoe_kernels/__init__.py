"""The kernels that jmoe's layers call. They import jax and never jmoe."""
