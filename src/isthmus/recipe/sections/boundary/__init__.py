"""``[boundary]`` and its subtables, one file each."""
