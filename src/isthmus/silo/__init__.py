"""The silo: training and inference on its own text, and the boundary that everything leaving it passes."""
