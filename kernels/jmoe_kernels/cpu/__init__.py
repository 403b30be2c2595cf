"""C++ kernels for CPUs over XLA's foreign function interface: experts, dense products, paged attention.

They are never required: ``get_library()`` says why where they are absent, and the portable forms serve.
"""

from jmoe_kernels.cpu.build import Library, get_library
from jmoe_kernels.cpu.calls import attend, call, linear, rotate, write_latent, write_pages

__all__ = ["Library", "attend", "call", "get_library", "linear", "rotate", "write_latent", "write_pages"]
