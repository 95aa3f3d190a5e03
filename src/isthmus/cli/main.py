"""The command ``isthmus``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from isthmus.engines.lifetime import Stopped, end_with_engine, stoppable
from isthmus.engines.threads import share_cores
from isthmus.errors import IsthmusError

app = typer.Typer(
    help="Fine-tune one language model together, on text that nobody may share.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipePath = Annotated[Path, typer.Argument(help="The federation's recipe (TOML).")]
RunPath = Annotated[Path, typer.Argument(help="A run directory.")]
RunOption = Annotated[Path, typer.Option("--run-dir", help="Where this role writes.")]
Address = Annotated[Optional[str], typer.Option(help="host:port in place of the recipe's.")]  # noqa: UP045


@app.command()
def run(
    recipe: Annotated[Optional[Path], typer.Argument(help="The federation's recipe (TOML).")] = None,  # noqa: UP045
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the run is written.")] = Path("runs/latest"),
    resume: Annotated[Optional[Path], typer.Option(help="Continue the run in this directory.")] = None,  # noqa: UP045
) -> None:
    """Run a whole federation on this machine."""
    from isthmus.engines.local import create_run
    from isthmus.errors import RecipeError
    from isthmus.recipe import Recipe
    from isthmus.report.live import run_with_progress
    from isthmus.storage.record import RunDirectory

    if (recipe is None) == (resume is None):
        raise RecipeError("give either a recipe or --resume", remedy="isthmus run RECIPE, or isthmus run --resume DIR")
    if resume is not None:
        directory = RunDirectory.open(resume)
    else:
        assert recipe is not None
        directory = create_run(Recipe.read(recipe), run_dir)
    run_with_progress(directory)
    typer.echo(f"run directory: {directory.path}")


@app.command()
def trunk(
    recipe: RecipePath,
    run_dir: RunOption = Path("runs/trunk"),
    address: Address = None,
    with_root: Annotated[bool, typer.Option(help="Be the root too, at the same address.")] = False,
) -> None:
    """Serve the middle of the model."""
    from isthmus.engines.local import at_address
    from isthmus.engines.roles import serve
    from isthmus.recipe import Recipe
    from isthmus.storage.record import RunDirectory

    roles = ("trunk", "root") if with_root else ("trunk",)
    serve(at_address(Recipe.read(recipe), address, roles), RunDirectory(run_dir), roles)


@app.command()
def root(recipe: RecipePath, run_dir: RunOption = Path("runs/root"), address: Address = None) -> None:
    """Lead the rounds and combine what the silos learned."""
    from isthmus.engines.local import at_address
    from isthmus.engines.roles import serve
    from isthmus.recipe import Recipe
    from isthmus.storage.record import RunDirectory

    serve(at_address(Recipe.read(recipe), address, ("root",)), RunDirectory(run_dir), ("root",))


@app.command()
def edge(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(help="This edge's name in the recipe.")],
    run_dir: RunOption = Path("runs/edge"),
    address: Address = None,
    parent: Address = None,
) -> None:
    """Sum what a cohort of silos learned, and pass the sum on."""
    from isthmus.engines.local import at_address
    from isthmus.engines.roles import serve_edge
    from isthmus.recipe import Recipe
    from isthmus.storage.record import RunDirectory

    read = at_address(Recipe.read(recipe), address, (name,))
    serve_edge(at_address(read, parent, (read.tree.parent(name),)), RunDirectory(run_dir), name)


@app.command()
def silo(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(help="This silo's name in the recipe.")],
    run_dir: RunOption = Path("runs/silo"),
    trunk: Address = None,
    root: Address = None,
    edge: Annotated[Optional[list[str]], typer.Option(help="NAME=host:port of an edge; may be given again.")] = None,  # noqa: UP045
) -> None:
    """Take part with this silo's own text."""
    from isthmus.engines.local import at_address, at_edge
    from isthmus.engines.roles import work
    from isthmus.recipe import Recipe
    from isthmus.storage.record import RunDirectory

    read = at_address(at_address(Recipe.read(recipe), trunk, ("trunk",)), root, ("root",))
    for one in edge or ():
        read = at_edge(read, one)
    work(read, RunDirectory(run_dir), name)


@app.command()
def certificates(recipe: RecipePath) -> None:
    """Make a certificate for every party of a recipe, where the recipe says."""
    from isthmus.engines.certificates import make_certificates
    from isthmus.recipe import Recipe

    read = Recipe.read(recipe)
    make_certificates(read, Path(read.wire.certificates))
    typer.echo(f"certificates: {read.wire.certificates} (give each party its own folder, and only that)")


@app.command()
def generate(
    run_dir: RunPath,
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    silo: Annotated[Optional[str], typer.Option(help="The silo to be; the first by default.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
) -> None:
    """Answer a prompt with the model of a run, split between this process and a trunk."""
    from isthmus.engines.use import generate_text
    from isthmus.storage.record import RunDirectory

    generate_text(RunDirectory.open(run_dir), prompt, silo, max_new_tokens=max_new_tokens, chat=chat)


@app.command()
def draft(
    run_dir: RunPath,
    silo: Annotated[Optional[str], typer.Option(help="The silo to be; the first by default.")] = None,  # noqa: UP045
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts to answer and learn from.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 96,
) -> None:
    """Distil what 'generate' drafts with, so that a round trip brings several tokens."""
    from isthmus.engines.use import make_draft
    from isthmus.storage.record import RunDirectory

    run = RunDirectory.open(run_dir)
    path = make_draft(run, silo, prompts=prompts, max_new_tokens=max_new_tokens, tell=typer.echo)
    typer.echo(f"draft: {path}")


@app.command()
def privacy(
    run_dir: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; an epsilon without a bound is null.")] = False,
) -> None:
    """Show what has left each silo and what it cost in privacy, from the ledgers, which are verified."""
    from rich.console import Console

    from isthmus.report import privacy_table
    from isthmus.storage.record import RunDirectory

    statements = privacy_table.read_statements(RunDirectory.open(run_dir))
    if as_json:
        typer.echo(privacy_table.as_json(statements))
    else:
        privacy_table.show(statements, Console())
    if not all(statement.verified for statement in statements):
        raise typer.Exit(1)


@app.command()
def export(run_dir: RunPath, out: Annotated[Path, typer.Argument(help="Folder to write.")]) -> None:
    """Write the run's adapter as a standard PEFT folder for the uncut model."""
    from isthmus.engines.use import export_adapter
    from isthmus.storage.record import RunDirectory

    rounds = export_adapter(RunDirectory.open(run_dir), out)
    typer.echo(f"adapter after {rounds} rounds: {out}")


@app.command()
def attack(
    target: Annotated[Path, typer.Argument(help="A run directory, or a recipe to try out.")],
    adversary: Annotated[
        list[str], typer.Option(help="trunk, trunk+silo, aggregator or outsider; may be given again.")
    ] = ["trunk+silo"],  # noqa: B006
    attack: Annotated[Optional[list[str]], typer.Option(help="Which; may be given again.")] = None,  # noqa: UP045
    rows: Annotated[int, typer.Option(min=1, help="Rows of the victim.")] = 40,
    own_rows: Annotated[int, typer.Option(min=2, help="Rows that the adversary learns from, at most.")] = 1000,
    victim: Annotated[Optional[str], typer.Option(help="A silo; the first by default.")] = None,  # noqa: UP045
    colluder: Annotated[Optional[str], typer.Option(help="A silo; the first other by default.")] = None,  # noqa: UP045
    public: Annotated[Optional[Path], typer.Option(help="Public text to learn from, a row a line.")] = None,  # noqa: UP045
    inference: Annotated[bool, typer.Option(help="Attack answers to the prompts, not training.")] = False,
    references: Annotated[int, typer.Option(min=0, help="Models trained to compare with, for membership.")] = 2,
    device: Annotated[str, typer.Option(help="Where attacks compute: cpu, cuda, cuda:1 or auto.")] = "cpu",
) -> None:
    """Try to recover a silo's text from what an adversary sees of it."""
    from isthmus.audit.extra import require_extra

    require_extra()
    from rich.console import Console

    from isthmus.attacks.catalogue import USUAL
    from isthmus.audit.attack import Order, note, opened, table
    from isthmus.audit.attack import attack as make_attacks

    source = opened(target)
    order = Order(
        tuple(adversary),
        tuple(attack or USUAL),
        victim,
        colluder,
        rows,
        own_rows,
        public,
        inference,
        references,
        device=device,
    )
    results = make_attacks(source, order, typer.echo)
    Console().print(table(results))
    if source.run is not None:
        typer.echo(f"written: {note(source.run, results)}")


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where the run is written.")] = Path("runs/demo"),
    cache: Annotated[Path, typer.Option(help="Where the model and the data are kept.")] = Path("build/demo"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds and no baselines.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed draws other rows.")] = 1,
) -> None:
    """Four silos, one small real model, real reviews: the whole of isthmus in a quarter of an hour."""
    from isthmus.demo.play import play

    play(run_dir, cache, quick=quick, seed=seed)


def main() -> None:
    """Run the command; errors of ours are told without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    share_cores()
    end_with_engine()
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        with stoppable():
            return app(standalone_mode=False) or 0
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
