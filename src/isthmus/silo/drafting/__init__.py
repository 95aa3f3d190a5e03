"""Tokens guessed in the silo and sent ahead, so that one round trip brings several."""
