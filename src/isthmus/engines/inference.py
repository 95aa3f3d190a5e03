"""Inference with a run's model: a silo in this process, the trunk in another one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from isthmus.data.conversations import asked_example, asked_text, nested_fields
from isthmus.data.templates import Example, Turn, chat_example, check_message
from isthmus.data.tokens import ending_tokens, prompt_tokens
from isthmus.engines.opening import open_run
from isthmus.errors import DataError
from isthmus.recipe import TaskSection
from isthmus.silo.drafting import draft_file
from isthmus.silo.drafting.distil import distil
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.join import Silo, load_data
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.greedy import text_before

WRITTEN_TOKENS = 64
"""Most tokens of a written answer where neither the caller nor the task says it."""


@dataclass(frozen=True)
class PromptRequest:
    """What a run's model is asked: a text, or fields, in the recipe's template."""

    text: str | None = None
    """The one field of the recipe's prompt; with ``raw`` and ``chat`` the text as it is."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a row by the names that the template has for them, in place of ``text``."""
    raw: bool = False
    """Take the text as the whole prompt."""
    chat: bool = False
    """Take the text as the user's turn in the model's own chat template, whatever the recipe's template is."""

    def example(self, task: TaskSection) -> Example:
        """The prompt as training has it.

        Raises:
            DataError: text and fields are both given, or neither, or they do not fill the recipe's template.
        """
        if (self.text is None) != bool(self.fields) or ((self.raw or self.chat) and self.text is None):
            raise DataError("give either a text or fields; raw and chat take a text", remedy="leave out one of them")
        if self.text is None:
            return asked_example(nested_fields(self.fields), task)
        check_message("the prompt", "text", self.text)
        if self.raw:
            return Example(self.text, "")
        if self.chat and not task.chat:
            system = [Turn("system", task.system)] if task.system else []
            return chat_example([*system, Turn("user", self.text)])
        return asked_text(self.text, task)


def named_fields(given: Iterable[str]) -> dict[str, str]:
    """Fields from texts of the form NAME=VALUE.

    Raises:
        DataError: a text has no name, or a name is given twice.
    """
    fields: dict[str, str] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name or name in fields:
            raise DataError(f"{text!r} is no field, or one that is given twice", remedy="write --field NAME=VALUE")
        fields[name] = value
    return fields


def generate_text(
    run: RunDirectory,
    prompt: str | PromptRequest,
    name: str | None,
    *,
    max_new_tokens: int | None = None,
    chat: bool = False,
    trunk: str | None = None,
    round: str | int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> str:
    """The greedy answer to a prompt, printed token by token.

    Args:
        prompt: a text that fills the recipe's template, or more about what is asked.
        name, trunk, round: as in ``opening.open_run``.
        max_new_tokens: longest answer, in tokens; None: as a known task says, else ``WRITTEN_TOKENS``.
        chat: for a text, ``PromptRequest.chat``.
        notify: called with a message that names the silo, if the folder holds several and none is named.

    Raises:
        DataError: the prompt does not fill the recipe's template.
        ModelError: a conversation with a tokenizer that has no chat template.
    """
    asked = PromptRequest(prompt, chat=chat) if isinstance(prompt, str) else prompt
    example = asked.example(run.recipe().task)
    with connected_silo(run, name, trunk=trunk, round=round, notify=notify) as (silo, directory):
        draft = load_draft(directory, silo)
        name_of_task = None if asked.raw or asked.chat else run.recipe().task.name
        task = named_task(name_of_task) if name_of_task else None
        longest = max_new_tokens or (task.longest if task else 0) or WRITTEN_TOKENS
        return stream_answer(silo, example, max_new_tokens=longest, draft=draft, stop=task.stop if task else ())


def make_draft(
    run: RunDirectory,
    name: str | None,
    *,
    prompts: int,
    max_new_tokens: int,
    notify: Callable[[str], None],
    trunk: str | None = None,
) -> Path:
    """Distil a silo's draft model from the split model's answers to the silo's training prompts.

    Args:
        name, trunk: as in ``opening.open_run``.
        prompts: number of training prompts, drawn at random.
        max_new_tokens: longest answer, in tokens.
        notify: called with messages about the progress.

    Returns:
        The draft's file. ``generate_text`` uses it from now on.

    Raises:
        DataError: the silo's rows are unusable, or it has none.
    """
    recipe = run.recipe()
    with connected_silo(run, name, trunk=trunk, notify=notify) as (silo, directory):
        rows = load_data(recipe, directory.path.name, silo).train
        if not rows:
            raise DataError(
                f"{silo.name} has no training rows, whose answers a draft learns", remedy="name some in silo.train"
            )
        drawn = random.Random(recipe.seed).sample(rows, min(prompts, len(rows)))
        draft, corpus = distil(silo, drawn, longest=max_new_tokens, notify=notify)
        path = directory.path / draft_file.DRAFT_FILE
        draft_file.save(path, draft, corpus)
        return path


def load_draft(directory: RoleDirectory, silo: Silo) -> Draft | None:
    """The draft model in a silo's folder; None if there is none."""
    path = directory.path / draft_file.DRAFT_FILE
    return draft_file.load(path, silo.model) if path.exists() else None


@contextmanager
def connected_silo(
    run: RunDirectory,
    name: str | None,
    *,
    trunk: str | None = None,
    round: str | int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[Silo, RoleDirectory]]:
    """A silo of the run, opened as ``opening.open_run`` does, and the silo's folder.

    Args:
        notify: called with a message that names the silo, if the folder holds several and none is named.
    """
    with open_run(run.path, name, trunk=trunk, round=round) as silo:
        here = run.silos()
        if name is None and len(here) > 1:
            notify(f"as silo {silo.name}; --silo names another one ({', '.join(here)})")
        yield silo, run.role(silo.name)


def stop_tokens(model: PreTrainedModel, ends: Iterable[int]) -> list[int] | None:
    """The tokens at which an answer ends: these, and those of the model's generation settings; None: there are none."""
    known = model.generation_config.eos_token_id
    return sorted({*ends, *([known] if isinstance(known, int) else known or ())}) or None


def stream_answer(
    silo: Silo, example: Example, *, max_new_tokens: int, draft: Draft | None = None, stop: Sequence[str] = ()
) -> str:
    """The greedy answer of a silo's model, printed token by token to standard output.

    Args:
        example: the prompt. It is sent in the tokens that a training row of it has.
        max_new_tokens: longest answer, in tokens.
        draft: model for speculative decoding.
        stop: texts before which an answer ends (see ``tasks.greedy``). What has been printed may go beyond.

    Raises:
        DataError: the prompt has no token, or cannot be read.
        ModelError: the example has turns, and the model no chat template.
    """
    tokenizer = silo.tokenizer
    ids = prompt_tokens(example, tokenizer)
    if not ids:
        raise DataError("the prompt has no token", remedy="give it a text")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = torch.tensor([ids], device=silo.model.device)
    output = silo.model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_tokens(silo.model, ending_tokens(example, tokenizer)),
        assistant_model=draft,
        stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, len(ids), stop)] if stop else []),
    )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    ended = text_before(text, stop)
    return text if ended is None else ended


class _Stops(StoppingCriteria):
    """Ends the one answer of a batch at the task's stop texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int, stop: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._stop = tokenizer, prompt, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        text = self._tokenizer.decode(input_ids[0, self._prompt :], skip_special_tokens=True)
        return torch.tensor([text_before(text, self._stop) is not None], device=input_ids.device)
