"""From a silo's files to batches of tokens. Everything here stays in the silo."""
