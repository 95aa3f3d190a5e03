"""The recipe's prompt template in tokens: the beginning and end of every prompt, which every party knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from transformers import PreTrainedTokenizerBase

from isthmus.data.conversations import ChatTemplate
from isthmus.data.encoding import TextEncoder
from isthmus.data.templates import Turn, chat_example
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
    literals = _chat_ends(task, tokenizer) if task.chat or task.messages else _literal_ends(task)
    if literals is None:
        return Template()
    before, after = literals
    markup = [(0, max(map(len, literals)))] if task.chat or task.messages else None
    encoder = TextEncoder(tokenizer)
    first = encoder.prompt(before, markup).ids
    one_token = all(len(one) == 1 for one in choice_tokens(tokenizer, task.continuations))
    last = encoder.answer(after.removesuffix(task.gap), markup or ()).ids if task.choices and one_token else []
    return Template(tuple(first), tuple(last))


def _literal_ends(task: TaskSection) -> tuple[str, str] | None:
    """Text before the first and after the last field of the prompt; None without a field."""
    pieces = list(Formatter().parse(task.text or task.prompt))
    fields = [number for number, (_, name, _, _) in enumerate(pieces) if name is not None]
    if not fields:
        return None
    before = "".join(literal for literal, *_ in pieces[: fields[0] + 1])
    return before, "".join(literal for literal, *_ in pieces[fields[-1] + 1 :])


def _chat_ends(task: TaskSection, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Text before and after what a conversation of one question says."""
    system = [Turn("system", task.system)] if task.system else []
    chat = ChatTemplate(tokenizer).write(chat_example([*system, Turn("user", "x")]))
    ends = None if task.messages else _literal_ends(task)
    before, after = ends or ("", "")
    return chat.prompt[: chat.opening - 1] + before, after + chat.prompt[chat.opening :]
