"""Speculative decoding: tokens drafted in the silo and verified by the trunk, several in a round trip."""
