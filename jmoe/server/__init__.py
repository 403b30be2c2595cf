"""The OpenAI-compatible HTTP server. It knows an engine only through ``engine_api`` and imports no jax.

The path of a chat request: ``app`` finds its handler in ``routes.generate``. ``request.body`` decodes the
body and checks it with the structs of ``request.schema``. ``request.prompts`` renders the chat template
(``template``) and tokenizes the text; ``request.params`` makes the engine's ``SamplingParams``. If
the answer must follow a grammar (``request.structured``, ``request.tools``), ``request.grammars`` compiles it
off the event loop. ``answer.generation`` makes one engine request for each answer, submits them to the
engine's thread and receives their increments on the event loop; ``answer.formats`` puts an increment into a
chunk or a whole answer, and ``answer.delivery`` sends it.
"""
