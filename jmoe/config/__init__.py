"""Typed tables that describe a model and the way to run it, and the one reader of settings."""
