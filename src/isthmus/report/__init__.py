"""What people read of a run: the live table, privacy tables, progress."""
