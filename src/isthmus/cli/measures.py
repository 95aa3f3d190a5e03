"""Commands that look at data, models and runs: rows, cuts, privacy, attacks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from isthmus.cli.app import AsJson, RecipePath, command, finish, notes_aside, notify, print_json


@command("privacy runs/first --json")
def privacy(
    run_dir: Annotated[Path, typer.Argument(help="A run directory; with --plan a recipe, too.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Before a run: how many passes over its rows each record can afford.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; an epsilon without a bound is null.")] = False,
) -> None:
    """Show what has left each silo and its privacy cost, from the ledgers, after verifying them."""
    from rich.console import Console

    from isthmus.errors import RunError
    from isthmus.report import privacy_table
    from isthmus.storage.record import RunDirectory

    if plan:
        _show_plan(run_dir, as_json)
        return
    if run_dir.is_file():
        raise RunError(
            f"{run_dir} is a file, and ledgers are in a run directory",
            remedy=f"name the run directory; what a recipe's budgets allow: isthmus privacy {run_dir} --plan",
        )
    statements = privacy_table.read_statements(RunDirectory.open(run_dir))
    if as_json:
        print_json({"statements": [statement.to_dict() for statement in statements]})
    else:
        privacy_table.show(statements, Console())
        typer.echo(f"next: isthmus attack {run_dir}")
    if not all(statement.verified for statement in statements):
        raise typer.Exit(1)


@command("data recipe.toml --silo north --examples 2")
def data(
    recipe: RecipePath,
    silo: Annotated[Optional[list[str]], typer.Option(help="Only this silo; repeatable. All by default.")] = None,  # noqa: UP045
    examples: Annotated[int, typer.Option(min=0, help="Training rows of each silo to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show what the silos' rows are like, as the model reads them: numbers, lengths, answers, duplicates, bad rows."""
    from rich.console import Console

    from isthmus.engines.data_check import summarize_data
    from isthmus.recipe import Recipe
    from isthmus.report import data_table

    summary = summarize_data(Recipe.read(recipe, undecided=True), silo or (), examples)
    if as_json:
        typer.echo(data_table.data_json(summary))
    else:
        data_table.show_data(summary, Console())
        typer.echo(f"next: isthmus cut {recipe}; isthmus run {recipe}")
    if any(one.error for one in summary.silos):
        raise typer.Exit(1)


@command("attack runs/first --victim north --rows 20")
def attack(
    target: Annotated[Path, typer.Argument(help="A run directory, or a recipe that has not run.")],
    adversary: Annotated[
        list[str],
        typer.Option(help="The adversary: trunk, trunk+silo, root+trunk, aggregator or outsider; repeatable."),
    ] = ["trunk+silo"],  # noqa: B006
    attack: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="linear, matching, transformer (these three by default), decoder, search, published, identify, "
            "labels, lens, responses, dager, gradient-matching or membership; repeatable."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of the victim's rows to attack.")] = 40,
    own_rows: Annotated[int, typer.Option(min=2, help="Most rows that the adversary learns from.")] = 1000,
    victim: Annotated[Optional[str], typer.Option(help="The silo to attack; the recipe's first by default.")] = None,  # noqa: UP045
    colluder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The silo that helps the adversary; the first one that is not the victim by default."),
    ] = None,
    public: Annotated[Optional[Path], typer.Option(help="Public text to learn from, one row per line.")] = None,  # noqa: UP045
    inference: Annotated[bool, typer.Option(help="Attack inference instead of training.")] = False,
    references: Annotated[int, typer.Option(min=0, help="Reference models for membership inference.")] = 2,
    device: Annotated[str, typer.Option(help="The device of the attacks: cpu, cuda, cuda:1 or auto.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Attack a run or a recipe, to measure what an adversary recovers of a silo's text."""
    from isthmus.audit.extra import require_extra

    require_extra()
    from rich.console import Console

    from isthmus.attacks.catalogue import DEFAULT_ATTACKS
    from isthmus.audit.attack import AttackPlan, open_target, results_table, run_attacks, save_results

    attacked = open_target(target)
    plan = AttackPlan(
        tuple(adversary),
        tuple(attack or DEFAULT_ATTACKS),
        victim,
        colluder,
        rows,
        own_rows,
        public,
        inference,
        references,
        device=device,
    )
    with notes_aside(as_json):
        results = run_attacks(attacked, plan, typer.echo)
    if not as_json:
        Console().print(results_table(results))
    saved = None if attacked.run is None else save_results(attacked.run, results)
    values = {"results": [asdict(one) for one in results], "file": saved}
    follows = f"isthmus run {target}" if saved is None else f"isthmus privacy {target}"
    finish(values, as_json, "" if saved is None else f"results: {saved}", following=follows)


@command('cut recipe.toml --cuts "1,1 2,2" --rtt 20 --write')
def cut(
    recipe: RecipePath,
    silo: Annotated[Optional[str], typer.Option(help="The silo to measure; the recipe's first by default.")] = None,  # noqa: UP045
    cuts: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help='Blocks at bottom and top, as "1,1 2,2"; repeatable. Six cuts by default.'),
    ] = None,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Rows to attack, 0 for no attack; 24, or half of the silo's, by default."),
    ] = None,
    attack: Annotated[list[str], typer.Option(help="linear, matching or transformer; repeatable.")] = ["linear"],  # noqa: B006
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="MB that the silo's process may take; what is free by default."),
    ] = None,
    leakage: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, max=1, help="Largest share of tokens recovered; the recipe's model.leakage by default."),
    ] = None,
    rtt: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="ms of a round trip to the trunk; measured by default, if the trunk is there."),
    ] = None,
    bandwidth: Annotated[Optional[float], typer.Option(min=0.001, help="MB/s to and from the trunk.")] = None,  # noqa: UP045
    trunk: Annotated[bool, typer.Option(help="Measure the trunk's part on this machine, too.")] = True,
    own: Annotated[bool, typer.Option("--own", help="Choose for this silo alone: silo.bottom and silo.top.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the chosen cut to the recipe.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure where to cut the model: memory, times, bytes and what an attack recovers, for each cut."""
    from rich.console import Console

    from isthmus.audit.cuts import CutPlan, measure_cuts, write_cut
    from isthmus.recipe import Recipe
    from isthmus.report import cut_table

    plan = CutPlan(
        silo,
        tuple(cuts or ()),
        rows,
        tuple(attack),
        None if memory is None else 1e6 * memory,
        leakage,
        None if rtt is None else 1e-3 * rtt,
        None if bandwidth is None else 1e6 * bandwidth,
        trunk,
        own,
    )
    choice = measure_cuts(Recipe.read(recipe, undecided=True), plan, notify)
    if as_json:
        typer.echo(cut_table.cut_json(choice))
    else:
        cut_table.show_cuts(choice, Console())
        follows = "" if write else f"with --write the choice is written to {recipe}; then "
        typer.echo(f"next: {follows}isthmus run {recipe}")
    if write:
        write_cut(recipe, choice.bottom, choice.top, choice.silo if own else None)
        notify(f"written: {recipe}")


@command("check model --cut 2,2")
def check(
    model: Annotated[str, typer.Argument(help="A model folder, or a model id of the Hugging Face hub.")],
    cut: Annotated[str | None, typer.Option(help="Blocks at bottom and top, as 2,3; a third each by default.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens of the longest row.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Compare a model of yours, split, with the uncut one: logits, greedy tokens, gradients."""
    from isthmus.engines.check import check_model
    from isthmus.engines.cuts import parse_cut
    from isthmus.model.cut import Cut

    result = check_model(model, None if cut is None else Cut(*parse_cut(cut)), length)
    lines = map(str, (*result.comparisons, *filter(None, [result.note]), result.verdict))
    values = {**asdict(result), "equal": result.equal, "verdict": result.verdict}
    if as_json:
        print_json(values)
    else:
        typer.echo("\n".join(lines))
    if result.equal:
        notify(f"next: isthmus init --model {model}")  # the verdict is the last line of standard output
        return
    raise typer.Exit(1)


def _show_plan(recipe: Path, as_json: bool) -> None:
    """What the budgets of a recipe, or of a run's, allow."""
    from rich.console import Console

    from isthmus.engines.privacy_plan import plan_privacy
    from isthmus.recipe import Recipe
    from isthmus.report import plan_table
    from isthmus.storage.record import RunDirectory

    read = RunDirectory.open(recipe).recipe() if recipe.is_dir() else Recipe.read(recipe, undecided=True)
    plans = [plan_privacy(read, silo.name) for silo in read.silo]
    if as_json:
        print_json({"plans": [asdict(plan) for plan in plans]})
    else:
        plan_table.show_plans(plans, read.privacy.delta, Console())
        typer.echo(f"next: isthmus run {'--resume ' if recipe.is_dir() else ''}{recipe}")
    if all(plan.spent for plan in plans):
        raise typer.Exit(1)
