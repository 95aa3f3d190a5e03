"""The recipe's prompt template in tokens: what stands before and after the text of every prompt, known to everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from transformers import PreTrainedTokenizerBase

from isthmus.recipe import TaskSection

Text = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """Tokens around a text."""

    before: Text = ()
    after: Text = ()

    def filled(self, text: Sequence[int]) -> Text:
        return (*self.before, *text, *self.after)

    def text_of(self, tokens: Sequence[int]) -> Text:
        """What stands within; a row that was cut at its beginning has lost ``before``."""
        text, first, last = tuple(tokens), len(self.before), len(self.after)
        if first and text[:first] == self.before:
            text = text[first:]
        return text[:-last] if last and text[-last:] == self.after else text


def template_of(task: TaskSection, tokenizer: PreTrainedTokenizerBase) -> Template:
    """What the recipe tells of every row that bottom reads.

    Where an answer has more than one token, the row goes on behind the prompt, so that nothing is known of its end.
    """
    pieces = list(Formatter().parse(task.prompt))
    fields = [number for number, (_, name, _, _) in enumerate(pieces) if name is not None]
    if not fields:
        return Template()
    before = "".join(literal for literal, *_ in pieces[: fields[0] + 1])
    after = "".join(literal for literal, *_ in pieces[fields[-1] + 1 :])
    first: list[int] = tokenizer(before)["input_ids"]
    short = all(len(tokenizer(one, add_special_tokens=False)["input_ids"]) == 1 for one in task.choices)
    last: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"] if task.choices and short else []
    return Template(tuple(first), tuple(last))
