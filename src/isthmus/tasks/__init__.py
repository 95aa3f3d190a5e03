"""Known tasks, as questions to a language model, and measures of its answers."""
