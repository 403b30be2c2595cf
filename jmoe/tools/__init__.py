"""The work of the commands; ``cli`` only parses and calls it."""
