"""The OpenAI-compatible endpoint that a silo runs for its own people, and a conversation in the terminal."""
