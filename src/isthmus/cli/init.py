"""``isthmus init``: a first recipe from flags, from answers to a few questions, or one of the shipped examples."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from isthmus.cli.app import AsJson, command, finish, notes_aside
from isthmus.errors import RecipeError

FIRST_CUT = (2, 2)
"""Blocks at bottom and top where no silo's rows are here to measure with."""
Names = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="A silo and its training rows, as north=north.csv, or its name alone, if it joins by an invite."),
]


@command("init --model model --silo north=north.csv --silo south=south.csv")
def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.toml"),
    model: Annotated[Optional[str], typer.Option(help="A model's folder, or its id on the Hugging Face hub.")] = None,  # noqa: UP045
    silo: Names = None,
    held_out: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A silo's held-out rows, as north=north_test.csv; repeatable."),
    ] = None,
    task: Annotated[Optional[str], typer.Option(help="A known task, as sentiment or rte.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="Template of the prompt, as '{text}'.")] = None,  # noqa: UP045
    answer: Annotated[Optional[str], typer.Option(help="Template of the answer, as ' {label}'.")] = None,  # noqa: UP045
    cut: Annotated[
        str, typer.Option(help="Blocks at bottom and top, as 2,2; auto: measured when a run starts.")
    ] = "auto",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="host:port at which silos on other machines reach this one."),
    ] = None,
    masks: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Sum updates under masks; by default with three silos or more."),
    ] = None,
    example: Annotated[Optional[str], typer.Option(help="Write a shipped recipe, as hospital-notes.")] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a first recipe, from flags or from answers to a few questions."""
    from isthmus.engines.cuts import parse_cut
    from isthmus.recipe import starter

    if recipe.exists() and not force:
        raise RecipeError(f"{recipe} is there already", remedy="name another file, or replace it with --force")
    if example is not None:
        _write(recipe, starter.example(example), checked=False)
        follows = f"put your paths into it, then isthmus data {recipe}"
        finish({"recipe": recipe}, as_json, f"written: {recipe}", following=follows)
        return
    with notes_aside(as_json):
        model, trained, tested = _asked(model, _pairs(silo, "--silo", alone=True), _pairs(held_out, "--held-out"))
    if strangers := tested.keys() - trained.keys():
        raise RecipeError(f"--held-out names {min(strangers)!r}, --silo does not", remedy="give both the same name")
    keys, why = _task(task, prompt, answer, trained)
    if not Path(model).exists():
        typer.echo(f"model: no folder {model} is here, so it is a model id of the Hugging Face hub", err=as_json)
    typer.echo(f"task: {why}", err=as_json)
    folder = recipe.parent
    silos = tuple(
        starter.StartingSilo(
            name,
            _seen_from(folder, source) if source else None,
            _seen_from(folder, tested[name]) if name in tested else None,
        )
        for name, source in trained.items()
    )
    masks = len(silos) >= starter.MASKED if masks is None else masks
    blocks = None if cut == "auto" else parse_cut(cut)
    if blocks is None and not all(trained.values()):
        blocks = FIRST_CUT
        typer.echo(f"cut: {FIRST_CUT}; it takes a silo's rows to measure one (isthmus cut)", err=as_json)
    first = starter.Starter(_seen_from(folder, model), silos, keys, blocks, masks, address)
    _write(recipe, first.text(), checked=True)
    follows = f"isthmus data {recipe}; isthmus run {recipe}" if all(trained.values()) else _by_invite(recipe)
    finish({"recipe": recipe, "task": keys}, as_json, f"written: {recipe}", following=follows)


def _by_invite(recipe: Path) -> str:
    trunk = f"isthmus trunk {recipe} --with-root --authority authority"
    return f"isthmus authority init {recipe}; {trunk}; isthmus invite NAME"


def _asked(
    model: str | None, trained: dict[str, str], tested: dict[str, str]
) -> tuple[str, dict[str, str], dict[str, str]]:
    """What was given, and what is missing from the terminal."""
    if (model is None or not trained) and not _terminal():
        raise RecipeError(
            "init needs a model and the silos",
            remedy="isthmus init --model model --silo north=north.csv --silo south=south.csv; "
            "isthmus init --example NAME writes a shipped recipe",
        )
    if model is None:
        model = typer.prompt("Model (a folder, or an id on the Hugging Face hub)")
    if trained:
        return model, trained, tested
    while name := typer.prompt("Name of a silo (empty: no more)", default="", show_default=False):
        trained[name] = typer.prompt(f"Training rows of {name} (a file, a folder, a pattern)")
        if held_out := typer.prompt(f"Held-out rows of {name} (empty: none)", default="", show_default=False):
            tested[name] = held_out
    return model, trained, tested


def _terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


def _pairs(given: list[str] | None, flag: str, *, alone: bool = False) -> dict[str, str]:
    """Names with their sources; where a name may stand alone, an empty source."""
    pairs = {}
    for one in given or []:
        name, equals, source = one.partition("=")
        if not (name and ((equals and source) or (alone and not equals))):
            raise RecipeError(f"{flag} {one!r} is no name with a file", remedy=f"write it as {flag} north=north.csv")
        if name in pairs:
            raise RecipeError(
                f"{flag} names {name!r} twice", remedy=f"name it once; several files: {flag} {name}=FOLDER"
            )
        pairs[name] = source
    return pairs


def _task(
    name: str | None, prompt: str | None, answer: str | None, trained: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """The keys of ``[task]``, and whence they are."""
    from isthmus.data.proposal import propose_task
    from isthmus.data.sources import read_rows
    from isthmus.tasks.catalogue import named_task

    rows = [row for source in trained.values() if source for row in read_rows([source])]
    if name is not None:
        return {"name": named_task(name).name}, name
    given = {key: value for key, value in (("prompt", prompt), ("answer", answer)) if value is not None}
    if given:
        return given, "as given"
    if not rows:
        raise RecipeError(
            "no silo's rows are here to tell what is asked",
            remedy="add --prompt '{text}' --answer ' {label}', or --task",
        )
    proposal = propose_task(rows)
    return dict(proposal.task), proposal.why


def _seen_from(folder: Path, source: str) -> str:
    """A path as a recipe in this folder names it; what is no path stays."""
    here = Path(source).exists() or any(mark in source for mark in "*?[")
    return os.path.relpath(source, folder) if here and not Path(source).is_absolute() else source


def _write(path: Path, text: str, *, checked: bool) -> None:
    """Write a recipe; one that cannot be read leaves no file."""
    from isthmus.recipe import Recipe
    from isthmus.storage.files import writing

    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o644)  # no secret: all parties get it
        if checked:
            Recipe.read(temporary, undecided=True)
