"""The recipe's prompt template in tokens: the beginning and end of every prompt, which every party knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from transformers import PreTrainedTokenizerBase

from isthmus.data.encoding import TextEncoder
from isthmus.data.tokens import choice_tokens
from isthmus.recipe import TaskSection

Text = tuple[int, ...]
"""A text in tokens."""


@dataclass(frozen=True)
class Template:
    """Tokens before and after a text."""

    before: Text = ()
    after: Text = ()

    def filled(self, text: Sequence[int]) -> Text:
        """The template with this text."""
        return (*self.before, *text, *self.after)

    def text_of(self, tokens: Sequence[int]) -> Text:
        """A filled template without the template. ``before`` may be missing: long rows lose their beginning."""
        text, first, last = tuple(tokens), len(self.before), len(self.after)
        if first and text[:first] == self.before:
            text = text[first:]
        return text[:-last] if last and text[-last:] == self.after else text


def template_of(task: TaskSection, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a training row's input.

    ``after`` is empty unless every answer is one token: the first tokens of a longer answer follow the prompt. Without
    a field in the prompt the template is empty.
    """
    pieces = list(Formatter().parse(task.prompt))
    fields = [number for number, (_, name, _, _) in enumerate(pieces) if name is not None]
    if not fields:
        return Template()
    before = "".join(literal for literal, *_ in pieces[: fields[0] + 1])
    after = "".join(literal for literal, *_ in pieces[fields[-1] + 1 :])
    encoder = TextEncoder(tokenizer)
    first = encoder.prompt(before).ids
    one_token = all(len(one) == 1 for one in choice_tokens(tokenizer, task.continuations))
    last = encoder.answer(after.removesuffix(task.gap)).ids if task.choices and one_token else []
    return Template(tuple(first), tuple(last))
