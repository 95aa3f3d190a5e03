"""What a run writes on disk: run directories, journals, whole-or-nothing files, bytes by number."""
