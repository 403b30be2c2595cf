"""The OpenAI-compatible HTTP server. It knows an engine by ``engine_api`` alone and imports no jax."""
