"""``jmoe bench``: a load generator for any OpenAI-compatible server, and measurements without one."""
