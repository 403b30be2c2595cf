"""Hugging Face directories: ``reader`` finds the tensors of one, ``writer`` makes one, ``hub`` fetches one."""
