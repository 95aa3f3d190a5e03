"""Measures of a model's answers."""
