"""What a model is and how it is run, as typed tables, and the one reader of settings."""
