"""Predictors of the experts that the next layers will need; each is in the file of its name in the config.

The other files are their parts: what all share (``base``), the table of them (``make``), the forecast of a
batch from those of its tokens (``forecasts``), what they read of a profile (``history``), and the store of
``expert_map`` (``map_store``).
"""
