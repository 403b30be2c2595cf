"""Which experts the next layers will need, by what is known of a sequence so far."""
