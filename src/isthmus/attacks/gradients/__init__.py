"""Attacks on gradients: labels, answers and texts from loss gradients at the boundary and from adapter updates."""
