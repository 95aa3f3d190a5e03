"""Ways to run a federation."""
