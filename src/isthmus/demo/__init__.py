"""What the demo needs beyond the package: its model and its text."""
