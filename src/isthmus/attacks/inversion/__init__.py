"""Attacks that read text from the hidden states that cross."""
