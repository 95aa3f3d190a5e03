"""Privacy: mechanisms that secure released tensors, accounting of their cost, detection of sensitive text."""
