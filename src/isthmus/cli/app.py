"""The application, and what its commands share: decorator, arguments, notes on the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from isthmus.engines.rank_place import refuse_ranks

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
MetricsAddress = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--metrics", help="host:port at which to answer /healthz and /metrics (Prometheus), without a key."),
]
TrunkAddress = Annotated[Optional[str], typer.Option(help="host:port of a trunk that serves the run, or of several.")]  # noqa: UP045

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; notes go to standard error.")]


def _print_version(asked: bool) -> None:
    if asked:
        import isthmus

        typer.echo(f"isthmus {isthmus.__version__}")
        raise typer.Exit


def command(
    example: str, name: str | None = None, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command, whose help ends with this example.

    Args:
        example: without the program's name.
        name: the command's, if it is not the function's.
        group: the commands that it is one of.
    """
    return group.command(name=name, epilog=f"Example: isthmus {example}")


@app.callback(epilog="Exit codes: 0 done, 1 an error (its remedy is printed), 2 wrong arguments, 130 stopped.")
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune one language model across silos that cannot share their text."""
    if context.invoked_subcommand != "trunk":
        refuse_ranks(str(context.invoked_subcommand))


def notify(message: str) -> None:
    """Print a note beside the output, to standard error."""
    typer.echo(message, err=True)


@contextmanager
def notes_aside(as_json: bool) -> Iterator[None]:
    """While the block runs, all that it prints is a note if the result is to be JSON."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def finish(values: Mapping[str, Any], as_json: bool, text: str = "", *, following: str) -> None:
    """Print a command's result, as JSON or as text, and what to type next.

    Args:
        values: the JSON object, as of ``print_json``.
        text: the result in words; empty: it is printed already.
        following: commands, parted by ``;``.
    """
    if as_json:
        print_json(values)
        notify(f"next: {following}")
    else:
        typer.echo(f"{text}\nnext: {following}" if text else f"next: {following}")


def print_json(values: Mapping[str, Any]) -> None:
    """Print a JSON object; a number that is not finite becomes null, a path its text."""
    typer.echo(json.dumps(_finite(values), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
