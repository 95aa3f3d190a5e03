"""Exactly what an adversary sees, filled from captured frames."""
