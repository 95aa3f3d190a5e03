"""Runs attacks over a run and scores what they find."""
