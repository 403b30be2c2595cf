"""The OpenAI-compatible HTTP server. It knows an engine only through ``engine_api`` and imports no jax.

The path of a chat request: ``app`` finds its handler in ``routes.generate``. ``request.body`` reads the body,
``request.decoding`` decodes it into a struct of ``request.schema``, and ``request.checks`` checks it: a
``CheckedChat`` holds how the answer uses tools (``request.tools``) and in which dialect (``dialects``), and
which grammar it must follow (``request.structured``). ``request.params`` makes the engine's
``SamplingParams``; ``request.prompts`` fits the messages to the chat template (``request.conversation``),
renders it (``template``) and tokenizes the text. ``request.grammars`` compiles the grammar off the event
loop, and ``request.prepared`` makes one engine request for each answer. ``answer.generation`` submits them to
the engine's thread and receives their increments on the event loop; a format (``answer.chats``,
``answer.calls``, ``answer.completions``) makes an increment or a whole answer a struct of ``answer.replies``,
and ``answer.delivery`` encodes and sends it.
"""
