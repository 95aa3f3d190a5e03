"""What a silo does to its bottom so that less of its text can be read from what crosses."""
