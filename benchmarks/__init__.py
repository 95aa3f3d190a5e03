"""Measurements: each module compares two things in one run and writes benchmarks/results/NAME.json."""
