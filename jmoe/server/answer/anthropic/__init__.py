"""The answers of Anthropic's Messages API."""
