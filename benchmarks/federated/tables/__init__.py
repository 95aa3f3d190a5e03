"""Tables on public tasks: quality beside the pooled model, parallel modes, local optimizers. ``make bench-tables``."""
