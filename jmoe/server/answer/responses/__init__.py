"""The answers of OpenAI's Responses API, and the store of them."""
