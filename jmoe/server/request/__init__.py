"""From the body of a request to what is requested from the engine."""
