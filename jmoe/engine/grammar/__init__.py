"""Grammars that an answer must follow, as masks over the vocabulary, and JSON schemas as grammars.

A grammar from an untrusted client is first tried by a fork of a child process (``check``, ``child``), which a
hostile grammar may crash; then ``grammar`` compiles it, and each answer gets its own constraint. It may
begin after the model's thoughts (``after_thoughts``). ``caution`` says for how long an answer keeps its masks
after its grammar has refused a token.
"""
