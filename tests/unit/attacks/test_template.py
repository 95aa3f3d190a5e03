"""The template in tokens is what rows share at their ends, and public text is put into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.attacks.template import Template, template_of
from isthmus.data.conversations import row_examples
from isthmus.data.sources import SourceRow
from isthmus.data.templates import Example
from isthmus.data.tokens import tokenize
from isthmus.recipe import TaskSection
from isthmus.silo.join import load_tokenizer
from tests.unit.data.readers import CHATML, byte_level, chatting

CASES = {
    "both ends": ("w5 w6 {text} w7 w8", [" w9", " w10"], 2, 2),
    "free text goes on behind the prompt": ("w5 {text} w7", [], 1, 0),
    "two fields": ("w5 {first} w6 {second} w7", [" w9", " w10"], 1, 1),
    "no field": ("w5 w6", [" w9", " w10"], 0, 0),
}


@pytest.mark.parametrize(("prompt", "choices", "before", "after"), CASES.values(), ids=CASES)
def test_ends_of_prompts(tiny: Path, prompt: str, choices: list[str], before: int, after: int) -> None:
    tokenizer = load_tokenizer(tiny)
    template = template_of(TaskSection(prompt=prompt, answer="{label}", choices=choices), tokenizer)
    said = prompt.replace("{text}", "w11 w12").replace("{first}", "w13").replace("{second}", "w14")
    (row,) = tokenize([Example(said, " w9")], tokenizer, 64, free_text=not choices)
    assert (len(template.before), len(template.after)) == (before, after)
    assert tuple(row.prompt[:before]) == template.before
    assert tuple(row.prompt[len(row.prompt) - after :]) == template.after


def test_what_stands_within_is_put_back() -> None:
    template = Template((1, 2), (3,))
    assert template.text_of(template.filled((7, 8))) == (7, 8)
    assert template.text_of((8, 3)) == (8,)


@pytest.mark.parametrize("form", ["chat", "messages"])
def test_a_chats_template_is_known_too(form: str) -> None:
    tokenizer = chatting(byte_level, CHATML)
    own = (
        {"prompt": "Note:\n{text}\n", "answer": "{label}", "chat": True} if form == "chat" else {"messages": ["turns"]}
    )
    task = TaskSection(choices=["yes", "no"], system="she is sad", **own)
    if form == "chat":
        fields: dict[str, object] = {"text": "he", "label": "no"}
    else:
        fields = {"turns": [{"role": role, "content": text} for role, text in (("user", "he"), ("assistant", "no"))]}
    ((_, example),) = row_examples(SourceRow("f:1", fields), task, {})
    (row,) = tokenize([example], tokenizer, 999, free_text=False, choices=task.choices)
    template = template_of(task, tokenizer)
    assert tuple(row.prompt[: len(template.before)]) == template.before
    assert (not template.after) or tuple(row.prompt[-len(template.after) :]) == template.after
    assert tokenizer.decode(template.text_of(row.prompt)).strip() == "he"
