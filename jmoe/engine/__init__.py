"""Continuous batching: requests in, tokens out.

``EngineWorker`` runs an ``Engine`` on a thread of its own. Each turn of the loop, ``schedule`` plans a step,
``step`` fills the host's arrays and starts it on the device, and the engine then delivers the tokens of the
step before it, while the device works. ``step.answers`` says what a token adds to an answer and whether it
ends it; ``Request.emit`` passes the increment on. ``build`` makes all of it from a directory and
``deployment``; ``LLM`` is the same for Python callers.
"""
