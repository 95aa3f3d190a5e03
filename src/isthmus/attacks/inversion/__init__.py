"""Embedding inversion: attacks that recover text from the hidden states that cross the boundary."""
