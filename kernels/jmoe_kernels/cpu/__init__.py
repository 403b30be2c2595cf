"""C++ kernels for CPUs over XLA's foreign function interface: experts, dense products, paged attention.

They are never required: if they are absent, ``why_missing()`` says why, and the portable forms run.

Axes: as in ``grouped_mlp`` and ``paged_attention``; of a dense product, M rows of x, N rows of w, K columns
of both; of ``rotate``, h = d / 2 angles per position.
"""

from jmoe_kernels.cpu.build import Library, get_library, why_missing
from jmoe_kernels.cpu.calls import attend, call, limit, linear, operands, rotate, write_latent, write_pages

__all__ = [
    "Library", "attend", "call", "get_library", "limit", "linear", "operands", "rotate", "why_missing",
    "write_latent", "write_pages",
]  # fmt: skip
