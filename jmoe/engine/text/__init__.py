"""Text to tokens and back: a checkpoint's tokenizer from all its files; text that grows token by token."""
