"""Rounds and the aggregation of what silos learned."""
