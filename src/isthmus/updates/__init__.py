"""The arithmetic of an adapter update, which silo and aggregator share."""
