"""What the root makes of a round's contributions."""
