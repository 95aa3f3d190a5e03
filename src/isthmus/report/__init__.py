"""The parts of a run that people read: the live table, the privacy table, progress and the spread over silos."""
