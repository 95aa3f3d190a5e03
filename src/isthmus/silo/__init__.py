"""What a silo does with its own text: data, boundary, training."""
