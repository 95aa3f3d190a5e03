"""``[task]``: how data rows become prompts and answers."""

from __future__ import annotations

import re
from string import Formatter
from typing import Literal

from pydantic import Field

from isthmus.recipe.section import Section

Truncation = Literal["front", "middle"]
"""Which part of a long prompt is dropped."""


class TaskSection(Section):
    """How a data row becomes a prompt and an answer. ``{field}`` stands for a field of the row."""

    prompt: str = "{prompt}"
    """Template of the text that the model reads."""
    answer: str = "{answer}"
    """Template of the text that the model learns to write after the prompt."""
    choices: tuple[str, ...] = Field(default=(), strict=False)
    """The possible answers of a classification task, for instance [" positive", " negative"]. Empty: free text.
    Shorter ones are filled up to the longest, so that no length or weight tells which one a row has."""
    truncate: Truncation = "front"
    """What a prompt loses that is too long and is shortened (train.long_rows): its beginning ("front") or its middle.
    The token that a tokenizer puts before a text stays."""

    @property
    def gap(self) -> str:
        """Spaces at the end of the prompt's template. They are read with the answer: tokenizers join a space to the
        word behind it."""
        text = self.prompt.rstrip(" ")
        return self.prompt[len(text) :] if text else ""

    @property
    def continuations(self) -> tuple[str, ...]:
        """The choices as they follow a prompt without its gap."""
        return tuple(self.gap + choice for choice in self.choices)

    @property
    def fields(self) -> frozenset[str]:
        """Names of the row's fields that the templates use; empty for a malformed template."""
        try:
            pieces = [*Formatter().parse(self.prompt), *Formatter().parse(self.answer)]
        except ValueError:
            return frozenset()
        return frozenset(re.split(r"[.\[]", name)[0] for _, name, _, _ in pieces if name)
