"""From a body of OpenAI's Responses API to a chat request."""
