"""The model's chat template: which messages it gets, and bounds on what it may do."""
