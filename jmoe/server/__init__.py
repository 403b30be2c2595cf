"""The OpenAI-compatible HTTP server. It knows an engine by ``engine_api`` alone and imports no jax.

The way of a chat request: ``app`` finds its handler in ``routes.generate``. ``request.body`` decodes and
checks the body by the structs of ``request.schema``. ``request.prompts`` renders the chat template
(``template``) and makes token ids of the text; ``request.params`` makes the engine's ``SamplingParams``. If
the answer must follow a grammar (``request.structured``, ``request.tools``), ``request.grammars`` compiles it
off the event loop. ``answer.generation`` makes one engine request for each answer, submits them to the
engine's thread and receives their increments on the event loop; ``answer.formats`` gives an increment its
place in a chunk or a whole answer, and ``answer.delivery`` sends it.
"""
