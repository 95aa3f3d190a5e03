"""Attacks that tell whether a row was trained on."""
