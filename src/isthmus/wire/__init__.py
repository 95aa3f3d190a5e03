"""The wire: frames, their bytes, and the channels they travel."""
