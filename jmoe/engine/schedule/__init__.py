"""Which requests the next step runs, and who holds which pages. Host code without jax."""
