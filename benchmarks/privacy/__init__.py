"""Recovery by attacks, and the cost of defences."""
