"""Membership inference: attacks that decide whether a row was trained on."""
