"""Inference with a run's model: a silo in this process, the trunk in a child process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from transformers import TextStreamer

from isthmus.engines.local import at_address, serving
from isthmus.engines.threads import set_threads
from isthmus.errors import ModelError
from isthmus.model import adapters
from isthmus.privacy.ledger import Ledger
from isthmus.recipe import Recipe
from isthmus.silo.drafting import draft_file
from isthmus.silo.drafting.distil import distil
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.join import Silo, join, load_data
from isthmus.silo.secrets import open_ledger
from isthmus.storage.record import RoleDirectory, RunDirectory


def generate_text(run: RunDirectory, prompt: str, name: str | None, *, max_new_tokens: int, chat: bool) -> str:
    """The greedy answer to a prompt, printed token by token.

    Args:
        name: the silo that runs bottom and top; None: the recipe's first.
        max_new_tokens: longest answer, in tokens.
        chat: wrap the prompt in the tokenizer's chat template.

    Raises:
        ModelError: ``chat`` with a tokenizer that has no chat template.
    """
    with connected_silo(run, name) as (silo, directory):
        draft = load_draft(directory, silo)
        return stream_answer(silo, prompt, max_new_tokens=max_new_tokens, chat=chat, draft=draft)


def make_draft(
    run: RunDirectory, name: str | None, *, prompts: int, max_new_tokens: int, notify: Callable[[str], None]
) -> Path:
    """Distil a silo's draft model from the split model's answers to the silo's training prompts.

    Args:
        name: the silo; None: the recipe's first.
        prompts: number of training prompts, drawn at random.
        max_new_tokens: longest answer, in tokens.
        notify: called with messages about the progress.

    Returns:
        The draft's file. ``generate_text`` uses it from now on.

    Raises:
        DataError: the silo's rows are unusable.
    """
    recipe = run.recipe()
    with connected_silo(run, name) as (silo, directory):
        rows = load_data(recipe, directory.path.name, silo).train
        drawn = random.Random(recipe.seed).sample(rows, min(prompts, len(rows)))
        draft, corpus = distil(silo, drawn, longest=max_new_tokens, tell=notify)
        path = directory.path / draft_file.NAME
        draft_file.save(path, draft, corpus)
        return path


def load_draft(directory: RoleDirectory, silo: Silo) -> Draft | None:
    """The draft model in a silo's folder; None if there is none."""
    path = directory.path / draft_file.NAME
    return draft_file.load(path, silo.model) if path.exists() else None


@contextmanager
def connected_silo(run: RunDirectory, name: str | None) -> Iterator[tuple[Silo, RoleDirectory]]:
    """A silo of the run, connected to a trunk in a child process, and the silo's folder.

    Releases are entered in the silo's ledger and charged to its privacy budget, as in training.

    Args:
        name: the silo; None: the recipe's first.
    """
    recipe = run.recipe()
    directory = run.role(recipe.party(name or recipe.silo[0].name).name)
    set_threads(recipe)
    with closing(open_ledger(directory, recipe, directory.path.name)) as ledger, serving(run) as (_, address):
        silo = open_silo(run, at_address(recipe, address), directory.path.name, ledger)
        try:
            yield silo, directory
        finally:
            silo.close()


def open_silo(run: RunDirectory, recipe: Recipe, name: str, ledger: Ledger | None = None) -> Silo:
    """A silo with the adapters of the last round that both trunk and root have saved, connected to the recipe's trunk.

    Args:
        ledger: the silo's privacy ledger; None: releases are not recorded.

    Raises:
        DataError: the recipe has a table ``sensitivity``, but the silo's rows are unusable.
    """
    silo = join(recipe, name, ledger=ledger, records=run.role(name).path / "records")
    if recipe.sensitivity is not None:
        load_data(recipe, name, silo)
    number = run.completed()
    if number:
        shared = run.role("root").load_round(number)["shared"]
        for part in silo.parts:
            adapters.load_adapter(part, shared)
    return silo


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
