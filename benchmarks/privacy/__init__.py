"""What attacks recover, and what defences cost."""
