"""From a body of Anthropic's Messages API to a chat request."""
