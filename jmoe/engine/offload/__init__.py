"""Experts in host memory: how their cache is built, and the runner that the host drives."""
