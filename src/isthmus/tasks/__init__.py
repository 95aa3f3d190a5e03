"""From data rows to prompts, from answers to scores."""
