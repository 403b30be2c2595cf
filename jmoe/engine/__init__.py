"""Continuous batching: requests in, tokens out.

``EngineWorker`` runs an ``Engine`` on a thread of its own. Each turn of the loop, ``schedule`` plans a step,
``step`` fills the host's arrays and starts it on the device, and the engine then delivers the tokens of the
step before it, while the device works. ``step.answers`` decides which text a token adds to an answer, and
whether the answer ends with that token. ``Request.emit`` passes the increment on. ``build`` makes an engine
from a directory and a ``deployment``; ``LLM`` is the interface for Python callers.
"""
