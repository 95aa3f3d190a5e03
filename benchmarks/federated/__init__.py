"""Learning together: quality, sums, robustness, privacy of silos."""
