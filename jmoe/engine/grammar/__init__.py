"""Grammars that an answer must follow, and JSON schemas as grammars."""
