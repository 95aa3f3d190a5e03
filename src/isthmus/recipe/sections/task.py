"""``[task]``: how data rows become prompts and answers."""

from __future__ import annotations

import re
from string import Formatter

from pydantic import Field

from isthmus.recipe.section import Section


class TaskSection(Section):
    """How a data row becomes a prompt and an answer. ``{field}`` stands for a field of the row."""

    prompt: str = "{prompt}"
    """Template of the text that the model reads."""
    answer: str = "{answer}"
    """Template of the text that the model learns to write after the prompt."""
    choices: tuple[str, ...] = Field(default=(), strict=False)
    """The possible answers of a classification task, for instance [" positive", " negative"]. Empty: free text.
    Shorter ones are filled up to the longest, so that no length or weight tells which one a row has."""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the row's fields that the templates use; empty for a malformed template."""
        try:
            pieces = [*Formatter().parse(self.prompt), *Formatter().parse(self.answer)]
        except ValueError:
            return frozenset()
        return frozenset(re.split(r"[.\[]", name)[0] for _, name, _, _ in pieces if name)
