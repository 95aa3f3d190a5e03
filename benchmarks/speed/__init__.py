"""Time, bytes and memory."""
