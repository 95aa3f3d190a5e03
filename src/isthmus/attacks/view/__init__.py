"""The view of an adversary: the data that it can see, decoded from captured frames."""
