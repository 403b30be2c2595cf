"""How to run a model: what users set, what memory there is, and what both come to on this machine."""
