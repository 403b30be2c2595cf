"""Predictors of the experts that the next layers will need, from what is known of a sequence so far."""
