"""A silo's text on its way to the model: files (``sources``), prompts and answers (``templates``), ``tokens``.

Nothing in this room leaves the silo.
"""
