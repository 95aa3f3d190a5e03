"""``[federation]`` and its subtables, one file each."""
