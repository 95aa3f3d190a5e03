"""What a run writes and what can be read from it."""
