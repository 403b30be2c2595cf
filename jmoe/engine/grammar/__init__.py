"""Grammars that an answer must follow, as masks over the vocabulary, and JSON schemas as grammars.

A grammar that a stranger sent is first tried by a fork of a child process (``check``, ``child``), which a
hostile one may end; then ``grammar`` compiles it, and each answer gets a constraint of its own.
"""
