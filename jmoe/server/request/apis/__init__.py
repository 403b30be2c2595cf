"""Bodies of other APIs, which become chat requests."""
