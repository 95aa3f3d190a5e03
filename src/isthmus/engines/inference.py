"""Inference with a run's model: a silo in this process, the trunk in another one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TextStreamer

from isthmus.engines.opening import open_run
from isthmus.errors import ModelError
from isthmus.silo.drafting import draft_file
from isthmus.silo.drafting.distil import distil
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.join import Silo, load_data
from isthmus.storage.record import RoleDirectory, RunDirectory


def generate_text(
    run: RunDirectory,
    prompt: str,
    name: str | None,
    *,
    max_new_tokens: int,
    chat: bool,
    trunk: str | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> str:
    """The greedy answer to a prompt, printed token by token.

    Args:
        name, trunk: as in ``opening.open_run``.
        max_new_tokens: longest answer, in tokens.
        chat: wrap the prompt in the tokenizer's chat template.
        notify: called with a message that names the silo, if the folder holds several and none is named.

    Raises:
        ModelError: ``chat`` with a tokenizer that has no chat template.
    """
    with connected_silo(run, name, trunk=trunk, notify=notify) as (silo, directory):
        draft = load_draft(directory, silo)
        return stream_answer(silo, prompt, max_new_tokens=max_new_tokens, chat=chat, draft=draft)


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
        DataError: the silo's rows are unusable.
    """
    recipe = run.recipe()
    with connected_silo(run, name, trunk=trunk, notify=notify) as (silo, directory):
        rows = load_data(recipe, directory.path.name, silo).train
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
    notify: Callable[[str], None] = lambda message: None,
) -> Iterator[tuple[Silo, RoleDirectory]]:
    """A silo of the run, opened as ``opening.open_run`` does, and the silo's folder.

    Args:
        notify: called with a message that names the silo, if the folder holds several and none is named.
    """
    with open_run(run.path, name, trunk=trunk) as silo:
        here = run.silos()
        if name is None and len(here) > 1:
            notify(f"as silo {silo.name}; --silo names another one ({', '.join(here)})")
        yield silo, run.role(silo.name)


def stream_answer(silo: Silo, prompt: str, *, max_new_tokens: int, chat: bool, draft: Draft | None = None) -> str:
    """The greedy answer of a silo's model, printed token by token to standard output.

    Args:
        max_new_tokens: longest answer, in tokens.
        chat: wrap the prompt in the tokenizer's chat template.
        draft: model for speculative decoding.

    Raises:
        ModelError: ``chat`` with a tokenizer that has no chat template.
    """
    tokenizer = silo.tokenizer
    if chat:
        if tokenizer.chat_template is None:
            raise ModelError("the model has no chat template", remedy="leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(silo.model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = silo.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id,
        assistant_model=draft,
    )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
