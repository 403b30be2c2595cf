"""One step on the device: its inputs, the jitted functions, the runner, what comes back."""
