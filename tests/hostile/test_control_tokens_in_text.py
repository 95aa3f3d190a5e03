"""A row's text that spells the model's control tokens: it stays text, ends no turn and no answer, and begins none.

``</s>`` or ``<|im_end|>`` in a patient's note closed the prompt, and ``<|im_start|>system`` wrote a system turn.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.conversations import row_examples
from isthmus.data.encoding import TextEncoder
from isthmus.data.sources import SourceRow
from isthmus.data.templates import fill_templates
from isthmus.data.tokens import Tokens, tokenize
from isthmus.recipe import TaskSection
from tests.unit.data.readers import CHATS, TOKENIZERS, byte_level, chatting, controls

SPELLINGS = [
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|endoftext|>",
    "[SEP]",
    "[CLS]",
    "<pad>",
    "<extra_id_0>",
]
PIECES = st.sampled_from([*SPELLINGS, "</", "s>", "＜/s＞", "<|im_", "end|>", " ", "she", "\n", "é", "no one"])
TEXTS = st.lists(PIECES, min_size=1, max_size=7).map("".join).filter(str.strip)


def tokens_of(kind: str, text: str, answer: str, **task: Any) -> Tokens:
    section = TaskSection(prompt="{text}", answer="{label}", **task)
    example = fill_templates(SourceRow("f:1", {"text": text, "label": answer}), section, {})
    options = {"free_text": not section.choices, "choices": section.continuations}
    return tokenize([example], TOKENIZERS[kind](), 10**6, **options)[0]


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, answer=TEXTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_control_token_comes_from_a_field(kind: str, text: str, answer: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    beginning, end = TextEncoder(tokenizer).beginning, tokenizer.eos_token_id
    row = tokens_of(kind, text, answer)
    assert row.prompt[: len(beginning)] == beginning
    own = row.answer[:-1] if end is not None else row.answer
    assert not {*row.prompt[len(beginning) :], *own} & controls(tokenizer)
    assert end is None or row.answer[-1] == end


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, answer=TEXTS)
@pytest.mark.parametrize("kind", ["byte-level", "slow bytes", "stories"])
def test_the_text_is_all_there(kind: str, text: str, answer: str) -> None:
    """With tokenizers that can write any text."""
    tokenizer = TOKENIZERS[kind]()
    row, first = tokens_of(kind, text, answer), len(TextEncoder(tokenizer).beginning)
    options = {} if kind == "slow bytes" else {"clean_up_tokenization_spaces": False}
    assert tokenizer.decode([*row.prompt[first:], *row.answer[:-1]], **options) == text + answer


def test_many_control_tokens_take_no_longer_than_their_number() -> None:
    row = tokens_of("byte-level", "<|im_end|>" * 3000, "no")
    assert byte_level().decode(row.prompt) == "<|im_end|>" * 3000


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["she is", "she is ", "She ", "no", "a/", "</", "Answer:\n", "Answer: "])
def test_no_length_or_token_of_a_prompt_tells_which_choice_is_right(kind: str, prompt: str) -> None:
    choices = ("py", " no", " no one", "s>", "</s>")
    rows = [tokens_of(kind, prompt, choice, choices=choices) for choice in choices]
    assert all(row.prompt == rows[0].prompt for row in rows)
    assert len({len(row.input) for row in rows}) == 1
    assert len({(*row.answer,) for row in rows}) == len(rows)


@settings(deadline=None, max_examples=40)
@given(system=TEXTS, user=TEXTS, said=TEXTS)
@pytest.mark.parametrize("kind", CHATS)
def test_a_conversation_has_the_turns_that_it_has(kind: str, system: str, user: str, said: str) -> None:
    """Whatever its turns say, its control tokens are those of one that says harmless words."""
    tokenizer = chatting(*CHATS[kind])

    def control_tokens(*texts: str) -> list[list[int]]:
        roles = ("system", "user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, (*texts, *texts[1:]), strict=True)]
        task = TaskSection(messages=("messages",))
        examples = [one for _, one in row_examples(SourceRow("f:1", {"messages": messages}), task, {})]
        rows = tokenize(examples, tokenizer, 10**6, free_text=True)
        return [[one for one in [*row.prompt, *row.answer] if one in controls(tokenizer)] for row in rows]

    assert control_tokens(system, user, said) == control_tokens("she", "he", "no")
