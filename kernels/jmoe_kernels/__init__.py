"""Kernels behind jmoe's layers. Imports jax only, never jmoe."""
