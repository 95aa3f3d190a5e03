"""Attacks that read labels, responses and text from gradients and updates."""
