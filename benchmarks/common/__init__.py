"""Code that several benchmarks share: result rows, data rows, memory, and a slow network."""
