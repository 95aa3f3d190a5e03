"""Storage: run directories, journals, atomically written files, and a bounded store of byte strings."""
