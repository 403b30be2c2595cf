"""The plan for running a model: the user's settings, the available memory, and the result of both on this
machine.
"""
