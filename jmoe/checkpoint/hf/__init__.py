"""Hugging Face directories: ``reader`` finds the tensors of one, ``writer`` and ``hub`` make one."""
