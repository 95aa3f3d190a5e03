"""``[task]``: how data rows become prompts and answers."""

from __future__ import annotations

import re
from string import Formatter
from typing import Literal

from pydantic import Field, model_validator

from isthmus.recipe.section import Section

Truncation = Literal["front", "middle"]
"""Which part of a long prompt is dropped."""


class TaskSection(Section):
    """How a data row becomes a prompt and an answer. ``{field}`` stands for a field of the row."""

    name: str | None = Field(default=None, examples=["rte"])
    """A known task in place of prompt, answer and choices: boolq, cb, copa, multirc, record, rte, wic, wsc, sentiment,
    pubmedqa, xsum, cnn_dailymail, scitldr, mts_dialog, coqa or canard. Left out: the templates here."""
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

    chat: bool = False
    """Whether the prompt is the user's turn and the answer the assistant's, in the model's own chat template."""
    system: str = ""
    """The system's turn before a conversation (chat, messages) that has none of its own; empty: none."""
    messages: tuple[str, ...] = Field(default=(), strict=False)
    """Fields that hold a conversation in place of prompt and answer, each a list of {role, content}: ["messages"], or
    ["prompt", "completion"]. Each of the assistant's turns in the last of them is learned."""
    text: str = ""
    """Template of a plain text in place of prompt and answer, of which every token is learned; empty: none."""
    join: str | None = Field(default=None, examples=[", "])
    """What stands between the texts of a list in a template. Left out: a list is refused."""

    @model_validator(mode="after")
    def _one_form(self) -> TaskSection:
        # by value: a run's recipe.toml has every key
        fields = type(self).model_fields
        given = [
            key
            for key in ("prompt", "answer", "choices", "messages", "text")
            if getattr(self, key) != fields[key].default
        ]
        if self.name and given:
            raise ValueError(f"name: a known task has its own templates; leave out task.{given[0]}, or task.name")
        forms = [name for name in ("chat", "messages", "text") if getattr(self, name)]
        if len(forms) > 1:
            raise ValueError(f"task.{forms[0]} and task.{forms[1]} exclude one another: a row has one form")
        if (self.messages or self.text) and given[0] in ("prompt", "answer"):
            raise ValueError(f"task.{forms[0]} takes the place of task.{given[0]}: leave one of them out")
        if self.system and not (self.chat or self.messages):
            raise ValueError("task.system needs task.chat or task.messages: plain text has no turns")
        if self.text and self.choices:
            raise ValueError("task.text has no answer, and no task.choices")
        return self

    @property
    def gap(self) -> str:
        """Spaces at the end of the prompt's template. They are read with the answer: tokenizers join a space to the
        word behind it."""
        text = "" if self.chat or self.messages or self.name else self.prompt.rstrip(" ")
        return self.prompt[len(text) :] if text else ""

    @property
    def continuations(self) -> tuple[str, ...]:
        """The choices as they follow a prompt without its gap."""
        return tuple(self.gap + choice for choice in self.choices)

    @property
    def asked(self) -> tuple[str, ...]:
        """What the prompt's template asks of a row, each once, with its parts: ``text``, ``patient.age``."""
        if self.messages or self.text or self.name:
            return ()
        return tuple(dict.fromkeys(_names(self.prompt)))

    @property
    def fields(self) -> frozenset[str]:
        """Names of the row's fields that are used; empty for a malformed template."""
        templates = () if self.messages or self.name else (self.text,) if self.text else (self.prompt, self.answer)
        try:
            names = [name for template in templates for name in _names(template)]
        except ValueError:
            return frozenset()
        return frozenset(re.split(r"[.\[]", name)[0] for name in (*names, *self.messages))


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]
