"""Serving with several processes."""
