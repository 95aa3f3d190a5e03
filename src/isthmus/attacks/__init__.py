"""The attacks that keep the privacy claims honest. They see a run only through ``view``."""
