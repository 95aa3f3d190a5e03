"""Defences of a silo that make its text harder to read from the hidden states that cross."""
