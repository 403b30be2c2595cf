"""Quantised weights of checkpoints: formats and methods that are read, and rounding while weights load."""
