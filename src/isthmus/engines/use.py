"""Using a run: answering prompts with its model, exporting its adapter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from transformers import TextStreamer

from isthmus.engines.local import at_address, serving
from isthmus.engines.threads import set_threads
from isthmus.errors import ModelError, RunError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.ledger import Ledger
from isthmus.recipe import Recipe
from isthmus.silo.drafting import draft_file
from isthmus.silo.drafting.distil import distil
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.join import Silo, join, known_data
from isthmus.silo.secrets import open_ledger
from isthmus.storage.record import RoleDirectory, RunDirectory, disk_errors

Tell = Callable[[str], None]


def export_adapter(run: RunDirectory, out: Path) -> int:
    """Write the adapter of bottom, trunk and top as one PEFT folder; returns the number of rounds behind it.

    Raises:
        RunError: the directory holds no finished round of trunk and root, or the uncut model has no place for what
            was trained.
    """
    recipe = run.recipe()
    boundary = recipe.boundary
    if boundary.width is not None or boundary.residual or boundary.denoise or boundary.tail is not None:
        raise RunError(
            "with boundary.tail, width, residual or denoise no adapter of the uncut model equals what was trained",
            remedy="use the run as it is, with 'isthmus generate'",
        )
    number, tensors = whole_adapter(run)
    with disk_errors(out):
        adapters.export(out, tensors, recipe.lora, recipe.model.path)
    return number


def whole_adapter(run: RunDirectory) -> tuple[int, dict[str, torch.Tensor]]:
    """The adapter after the last round that trunk and root both have, by uncut name."""
    trunk, root, number = run.role("trunk"), run.role("root"), run.completed()
    if number == 0:
        raise RunError(f"{run.path} holds no finished round", remedy="let the run finish a round first")
    recipe = run.recipe()
    frozen = adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    return number, {**frozen, **trunk.load_round(number)["adapter"], **root.load_round(number)["shared"]}


def generate_text(run: RunDirectory, prompt: str, name: str | None, *, max_new_tokens: int, chat: bool) -> str:
    """Answer a prompt, printing tokens as they come; the trunk runs in a process of its own.

    Args:
        name: the silo to be; the recipe's first by default.
        chat: wrap the prompt in the tokenizer's chat template.

    Returns:
        The answer.
    """
    with opened(run, name) as (silo, directory):
        draft = draft_of(directory, silo)
        return answer(silo, prompt, max_new_tokens=max_new_tokens, chat=chat, draft=draft)


def make_draft(run: RunDirectory, name: str | None, *, prompts: int, max_new_tokens: int, tell: Tell) -> Path:
    """Distil a silo's draft from the split model's answers to its own training prompts.

    Args:
        prompts: how many, drawn from the silo's rows.
        tell: gets a sentence now and then.

    Returns:
        The file, which ``generate_text`` uses from now on.

    Raises:
        DataError: the silo's rows are unusable.
    """
    recipe = run.recipe()
    with opened(run, name) as (silo, directory):
        rows = known_data(recipe, directory.path.name, silo).train
        drawn = random.Random(recipe.seed).sample(rows, min(prompts, len(rows)))
        draft, corpus = distil(silo, drawn, longest=max_new_tokens, tell=tell)
        path = directory.path / draft_file.NAME
        draft_file.save(path, draft, corpus)
        return path


def draft_of(directory: RoleDirectory, silo: Silo) -> Draft | None:
    """The draft that was distilled for this silo, if one was."""
    path = directory.path / draft_file.NAME
    return draft_file.load(path, silo.model) if path.exists() else None


@contextmanager
def opened(run: RunDirectory, name: str | None) -> Iterator[tuple[Silo, RoleDirectory]]:
    """A silo of the run (the recipe's first by default) with its folder; its trunk runs in a process of its own.

    What leaves the silo is noted in its ledger and charged, as in training.
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
    """A silo with the adapters of the last round that trunk and root both have, connected to the recipe's trunk.

    Raises:
        DataError: sensitivity is asked for, but the silo's rows are unusable.
    """
    silo = join(recipe, name, ledger=ledger, records=run.role(name).path / "records")
    if recipe.sensitivity is not None:
        known_data(recipe, name, silo)
    number = run.completed()
    if number:
        shared = run.role("root").load_round(number)["shared"]
        for part in silo.parts:
            adapters.load_adapter(part, shared)
    return silo


def answer(silo: Silo, prompt: str, *, max_new_tokens: int, chat: bool, draft: Draft | None = None) -> str:
    """Greedy answer of a silo's model, streamed to standard output.

    Raises:
        ModelError: ``chat``, but the tokenizer has no chat template.
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
