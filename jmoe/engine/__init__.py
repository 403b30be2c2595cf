"""Continuous batching: requests in, tokens out. Only ``runner``, ``sampling`` and ``stats`` know of jax."""
