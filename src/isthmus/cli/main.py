"""The command ``isthmus``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from isthmus.cli.init import init
from isthmus.cli.terminal import as_utf8, check_arguments, encoding_error, flush_output, prepare_log, prepare_output
from isthmus.engines.lifetime import Stopped, end_with_engine, stoppable
from isthmus.engines.threads import share_cores
from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(help="The federation's recipe (TOML).")]
Served = Annotated[Path, typer.Argument(help="The federation's recipe (TOML), or the run directory of a finished run.")]
RunPath = Annotated[Path, typer.Argument(help="A run directory.")]
RunOption = Annotated[Path, typer.Option("--run-dir", help="The run directory that this role writes to.")]
Address = Annotated[Optional[str], typer.Option(help="host:port instead of the recipe's address.")]  # noqa: UP045
Longest = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Longest written answer, in tokens; by default as a known task says, else 64."),
]
Round = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help='best, last, or the number of a kept round; best by default with train.evaluate = "best".'),
]
TrunkAddress = Annotated[Optional[str], typer.Option(help="host:port of a trunk that serves the run.")]  # noqa: UP045


def _print_version(asked: bool) -> None:
    if asked:
        import isthmus

        typer.echo(f"isthmus {isthmus.__version__}")
        raise typer.Exit


def command(example: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command, whose help ends with this example.

    Args:
        example: without the program's name.
        name: the command's, if it is not the function's.
    """
    return app.command(name=name, epilog=f"Example: isthmus {example}")


@app.callback(epilog="Exit codes: 0 done, 1 an error (its remedy is printed), 2 wrong arguments, 130 stopped.")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune one language model across silos that cannot share their text."""


command("init --model model --silo north=north.csv --silo south=south.csv")(init)


class Baseline(StrEnum):
    """The baselines of a run."""

    alone = "alone"
    pooled = "pooled"


@command("run recipe.toml --run-dir runs/first")
def run(
    recipe: Annotated[Optional[Path], typer.Argument(help="The federation's recipe (TOML).")] = None,  # noqa: UP045
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The run directory to create.")] = Path("runs/latest"),
    resume: Annotated[Optional[Path], typer.Option(help="Continue the run in this directory.")] = None,  # noqa: UP045
    baseline: Annotated[
        Optional[Baseline],  # noqa: UP045
        typer.Option(help="Train instead what the run is compared with: each silo alone, or one model on all rows."),
    ] = None,
) -> None:
    """Run a whole federation on this machine."""
    from isthmus.engines.local import create_run, open_resumed
    from isthmus.errors import RecipeError
    from isthmus.recipe import Recipe
    from isthmus.report.live import run_with_progress
    from isthmus.storage.record import RunDirectory

    if (recipe is None) == (resume is None):
        raise RecipeError("give either a recipe or --resume", remedy="isthmus run RECIPE, or isthmus run --resume DIR")
    if baseline is not None:
        _train_baseline(recipe, resume or run_dir, baseline.value)
        return
    if resume is not None:
        directory = open_resumed(resume)
    else:
        assert recipe is not None
        read = Recipe.read(recipe, undecided=True)
        if read.model.cut == "auto":
            RunDirectory.require_free(run_dir)
            read = _measured_cut(read)
        directory = create_run(read, run_dir)
    run_with_progress(directory)
    typer.echo(f"run directory: {directory.path}")
    typer.echo(
        f"next: isthmus generate {directory.path} PROMPT; isthmus evaluate {directory.path}; "
        f"isthmus export {directory.path} OUT; "
        f'in Python: isthmus.open("{directory.path}")'
    )


@command("trunk recipe.toml --with-root --address 0.0.0.0:50051")
def trunk(
    recipe: Served,
    run_dir: RunOption = Path("runs/trunk"),
    address: Address = None,
    with_root: Annotated[bool, typer.Option(help="Serve the root too, at the same address.")] = False,
    round: Annotated[Optional[int], typer.Option(min=0, help="The round to serve; the last by default.")] = None,  # noqa: UP045
) -> None:
    """Serve the trunk, the middle blocks of the model: for a federation, or to use a finished run."""
    from isthmus.engines.roles import serve

    serve(recipe, run_dir, ("trunk", "root") if with_root else ("trunk",), address, round)


@command("root recipe.toml --run-dir runs/root")
def root(recipe: Served, run_dir: RunOption = Path("runs/root"), address: Address = None) -> None:
    """Serve the root, which leads the rounds and aggregates the silos' updates."""
    from isthmus.engines.roles import serve

    serve(recipe, run_dir, ("root",), address)


@command("edge recipe.toml west --run-dir runs/west")
def edge(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(help="This edge's name in the recipe.")],
    run_dir: RunOption = Path("runs/edge"),
    address: Address = None,
    parent: Address = None,
) -> None:
    """Serve an edge, which sums the updates of its silos and sends the sum to its parent."""
    from isthmus.engines.local import at_address
    from isthmus.engines.roles import recorded, serve_edge
    from isthmus.recipe import Recipe

    read = Recipe.read(recipe)
    read = at_address(read, parent, (read.tree.parent(name),))
    run = recorded(recipe, read, run_dir)
    serve_edge(at_address(read, address, (name,)), run, name)


@command("silo recipe.toml north --run-dir runs/north")
def silo(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(help="This silo's name in the recipe.")],
    run_dir: RunOption = Path("runs/silo"),
    trunk: Address = None,
    root: Address = None,
    edge: Annotated[Optional[list[str]], typer.Option(help="An edge's address as NAME=host:port; repeatable.")] = None,  # noqa: UP045
) -> None:
    """Run one silo, which trains on its own text."""
    from isthmus.engines.local import at_address, at_edge
    from isthmus.engines.roles import recorded, run_silo
    from isthmus.recipe import Recipe

    read = at_address(at_address(Recipe.read(recipe), trunk, ("trunk",)), root, ("root",))
    for option in edge or ():
        read = at_edge(read, option)
    read.party(name)
    run_silo(read, recorded(recipe, read, run_dir, name), name)


@command("certificates recipe.toml")
def certificates(recipe: RecipePath) -> None:
    """Make a certificate for every party of a recipe, in the folder that the recipe names."""
    from isthmus.engines.certificates import make_certificates
    from isthmus.recipe import Recipe

    read = Recipe.read(recipe, undecided=True)
    make_certificates(read, Path(read.wire.certificates))
    typer.echo(f"certificates: {read.wire.certificates} (give each party its own folder and no other)")


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
) -> None:
    """Answer a prompt with a run's model, split between this process and a trunk process."""
    from isthmus.engines.inference import PromptRequest, generate_text, named_fields
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    text, fields = None if prompt is None else as_utf8(prompt), named_fields(map(as_utf8, field or ()))
    asked = PromptRequest(text, fields, raw, chat)
    generate_text(run, asked, silo, max_new_tokens=max_new_tokens, trunk=trunk, round=round, notify=_notify)


@command("batch runs/first questions.csv answers.jsonl")
def batch(
    run_dir: RunPath,
    rows: Annotated[Path, typer.Argument(help="JSONL file of rows, without their answers.")],
    out: Annotated[Path, typer.Argument(help="File to write: a JSON object with the answer to each row, in order.")],
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    max_new_tokens: Longest = None,
    trunk: TrunkAddress = None,
    round: Round = None,
) -> None:
    """Answer a file of rows in the recipe's template. The same command goes on where it was stopped."""
    from isthmus.engines.batch import answer_file
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    how = {"trunk": trunk, "round": round}
    count = answer_file(run, rows, out, silo, max_new_tokens=max_new_tokens, notify=_notify, **how)
    typer.echo(f"{count:,} answers: {out}")


@command("draft runs/first --prompts 200")
def draft(
    run_dir: RunPath,
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts whose answers the draft learns.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 96,
    trunk: TrunkAddress = None,
) -> None:
    """Distil a small draft model for 'generate', so that one round trip yields several tokens."""
    from isthmus.engines.inference import make_draft
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    path = make_draft(run, silo, prompts=prompts, max_new_tokens=max_new_tokens, notify=typer.echo, trunk=trunk)
    typer.echo(f"draft: {path}")


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
        typer.echo(privacy_table.as_json(statements))
    else:
        privacy_table.show(statements, Console())
    if not all(statement.verified for statement in statements):
        raise typer.Exit(1)


@command("data recipe.toml --silo north --examples 2")
def data(
    recipe: RecipePath,
    silo: Annotated[Optional[list[str]], typer.Option(help="Only this silo; repeatable. All by default.")] = None,  # noqa: UP045
    examples: Annotated[int, typer.Option(min=0, help="Training rows of each silo to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    if any(one.error for one in summary.silos):
        raise typer.Exit(1)


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a run's model on held-out rows or on a file: accuracy, F1, ROUGE, with standard errors, for each silo."""
    from rich.console import Console

    from isthmus.engines.evaluation import compare, evaluate_run, write_predictions
    from isthmus.report import evaluation_table
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    how = {"trunk": trunk, "round": round}
    found = evaluate_run(run, silo or (), data=data or (), max_new_tokens=max_new_tokens, notify=_notify, **how)
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


@command("export runs/first adapter", name="export")
def export_run(
    run_dir: RunPath,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    round: Round = None,
) -> None:
    """Write a run's adapter as a PEFT folder for the uncut model."""
    from isthmus.engines.export import export_adapter
    from isthmus.storage.record import RunDirectory

    rounds = export_adapter(RunDirectory.open(run_dir), out, round)
    typer.echo(f"adapter after {rounds} rounds: {out}")


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
    results = run_attacks(attacked, plan, typer.echo)
    Console().print(results_table(results))
    if attacked.run is not None:
        typer.echo(f"results: {save_results(attacked.run, results)}")


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    choice = measure_cuts(Recipe.read(recipe, undecided=True), plan, _notify)
    if as_json:
        typer.echo(cut_table.cut_json(choice))
    else:
        cut_table.show_cuts(choice, Console())
        if not write:
            typer.echo(f"next: with --write the choice is written to {recipe}; then isthmus run {recipe}")
    if write:
        write_cut(recipe, choice.bottom, choice.top, choice.silo if own else None)
        _notify(f"written: {recipe}")


@command("check model --cut 2,2")
def check(
    model: Annotated[str, typer.Argument(help="A model folder, or a model id of the Hugging Face hub.")],
    cut: Annotated[str | None, typer.Option(help="Blocks at bottom and top, as 2,3; a third each by default.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens of the longest row.")] = 64,
) -> None:
    """Compare a model of yours, split, with the uncut one: logits, greedy tokens, gradients."""
    from isthmus.engines.check import check_model
    from isthmus.engines.cuts import parse_cut
    from isthmus.model.cut import Cut

    result = check_model(model, None if cut is None else Cut(*parse_cut(cut)), length)
    for line in (*result.comparisons, *filter(None, [result.note]), result.verdict):
        typer.echo(line)
    if not result.equal:
        raise typer.Exit(1)


@command("demo --quick")
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="The run directory to create.")] = Path("runs/demo"),
    cache: Annotated[Path, typer.Option(help="Folder for the model and the data.")] = Path("build/demo"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds and no baselines.")] = False,
    seed: Annotated[int, typer.Option(help="The seed for the rows, their order and the initial adapters.")] = 1,
) -> None:
    """Run a demonstration: four silos fine-tune a small real model on real reviews, in about 15 minutes."""
    from isthmus.demo.play import play

    play(run_dir, cache, quick=quick, seed=seed)


def _train_baseline(recipe: Path | None, run_dir: Path, kind: Literal["alone", "pooled"]) -> None:
    """Train a baseline of a recipe, or of the run in this directory."""
    from isthmus.engines.baselines import baseline_run, train_baseline
    from isthmus.engines.local import open_resumed
    from isthmus.recipe import Recipe

    directory = open_resumed(run_dir) if recipe is None else baseline_run(Recipe.read(recipe, undecided=True), run_dir)
    train_baseline(directory, kind, typer.echo)
    typer.echo(f"run directory: {directory.path}\nnext: isthmus evaluate {directory.path}")


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
        typer.echo(plan_table.plan_json(plans))
    else:
        plan_table.show_plans(plans, read.privacy.delta, Console())
    if all(plan.spent for plan in plans):
        raise typer.Exit(1)


def _measured_cut(recipe: Recipe) -> Recipe:
    """The recipe with the cut that a measurement on this machine chooses; its table is printed."""
    from rich.console import Console

    from isthmus.audit.cuts import cut_for_run
    from isthmus.report.cut_table import show_cuts

    choice = cut_for_run(recipe, _notify)
    show_cuts(choice, Console())
    return recipe.with_cut(choice.bottom, choice.top)


def _notify(message: str) -> None:
    typer.echo(message, err=True)


def main() -> None:
    """Run the command. Errors of isthmus are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its own lines about a handshake; the error says what is wrong
    prepare_output()
    prepare_log()
    share_cores()
    end_with_engine()
    sys.exit(flush_output(_exit_code()))


def _exit_code() -> int:
    try:
        with stoppable():
            return app(check_arguments(sys.argv[1:]), standalone_mode=False) or 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    except UnicodeEncodeError as error:
        print(f"error: {encoding_error(error)}", file=sys.stderr, flush=True)
        return 1
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (Stopped, typer.Abort) as stop:
        print(str(stop) or "stopped", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            return 2
        raise
