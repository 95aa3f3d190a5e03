"""Commands that use what a run has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from isthmus.cli.app import AsJson, Longest, Round, RunPath, TrunkAddress, command, finish, notes_aside, notify
from isthmus.cli.terminal import as_utf8


@command('generate runs/first "The patient reports" --max-new-tokens 40')
def generate(
    run_dir: RunPath,
    prompt: Annotated[Optional[str], typer.Argument(help="The text in the recipe's prompt.")] = None,  # noqa: UP045
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    max_new_tokens: Longest = None,
    field: Annotated[Optional[list[str]], typer.Option(help="A field of the prompt as NAME=VALUE; repeatable.")] = None,  # noqa: UP045
    raw: Annotated[bool, typer.Option(help="Take the text as it is, without the recipe's prompt.")] = False,
    chat: Annotated[bool, typer.Option(help="Put the text alone into the model's chat template.")] = False,
    trunk: TrunkAddress = None,
    round: Round = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a run's model, split between this process and a trunk process."""
    from isthmus.engines.inference import PromptRequest, generate_text, named_fields
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    text, fields = None if prompt is None else as_utf8(prompt), named_fields(map(as_utf8, field or ()))
    asked = PromptRequest(text, fields, raw, chat)
    with notes_aside(as_json):
        answer = generate_text(run, asked, silo, max_new_tokens=max_new_tokens, trunk=trunk, round=round, notify=notify)
    follows = f"isthmus privacy {run_dir}; isthmus chat {run_dir}"
    if as_json:
        finish({"answer": answer}, as_json, following=follows)
    else:
        notify(f"next: {follows}")  # standard output has the answer and nothing else


@command("batch runs/first questions.csv answers.jsonl")
def batch(
    run_dir: RunPath,
    rows: Annotated[Path, typer.Argument(help="JSONL file of rows, without their answers.")],
    out: Annotated[Path, typer.Argument(help="File to write: a JSON object with the answer to each row, in order.")],
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    max_new_tokens: Longest = None,
    trunk: TrunkAddress = None,
    round: Round = None,
    as_json: AsJson = False,
) -> None:
    """Answer a file of rows in the recipe's template. The same command goes on where it was stopped."""
    from isthmus.engines.batch import answer_file
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    how = {"trunk": trunk, "round": round}
    count = answer_file(run, rows, out, silo, max_new_tokens=max_new_tokens, notify=notify, **how)
    follows = f"isthmus privacy {run_dir}"
    finish({"answers": count, "file": out}, as_json, f"{count:,} answers: {out}", following=follows)


@command("draft runs/first --prompts 200")
def draft(
    run_dir: RunPath,
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts whose answers the draft learns.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 96,
    trunk: TrunkAddress = None,
    as_json: AsJson = False,
) -> None:
    """Distil a small draft model for 'generate', so that one round trip yields several tokens."""
    from isthmus.engines.inference import make_draft
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    with notes_aside(as_json):
        path = make_draft(run, silo, prompts=prompts, max_new_tokens=max_new_tokens, notify=typer.echo, trunk=trunk)
    finish({"draft": path}, as_json, f"draft: {path}", following=f"isthmus generate {run_dir} PROMPT")


@command("evaluate runs/first --data unseen.csv --out answers.jsonl", name="evaluate")
def evaluate_answers(
    run_dir: RunPath,
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="File of rows in place of the silos' held-out ones; repeatable."),
    ] = None,
    silo: Annotated[Optional[list[str]], typer.Option(help="Only this silo; repeatable. All by default.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="File to write: a JSON object with each row's answer.")] = None,  # noqa: UP045
    max_new_tokens: Longest = None,
    trunk: TrunkAddress = None,
    round: Round = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run's model on held-out rows or on a file: accuracy, F1, ROUGE, with standard errors, for each silo."""
    from rich.console import Console

    from isthmus.engines.evaluation import compare, evaluate_run, write_predictions
    from isthmus.report import evaluation_table
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    how = {"trunk": trunk, "round": round}
    found = evaluate_run(run, silo or (), data=data or (), max_new_tokens=max_new_tokens, notify=notify, **how)
    evaluations = list(found)
    comparisons = compare(run.recipe(), evaluations)
    if out is not None:
        write_predictions(out, evaluations)
    if as_json:
        typer.echo(evaluation_table.evaluations_json(evaluations, comparisons))
    else:
        evaluation_table.show_evaluations(evaluations, Console(), comparisons)
        if out is not None:
            typer.echo(f"answers: {out}")
        typer.echo(f"next: isthmus export {run_dir} adapter; isthmus attack {run_dir}")
