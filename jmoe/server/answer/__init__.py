"""From the engine's increments to the bodies and events of an answer."""
