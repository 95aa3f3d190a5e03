"""Attacks on a run or a recipe: each adversary's view is captured, attacked, and scored against the truth."""
