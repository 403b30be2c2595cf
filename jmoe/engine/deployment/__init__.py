"""How to run a model: the user's settings, the memory there is, and what both result in on this machine."""
