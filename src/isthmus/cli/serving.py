"""Commands by which a silo's own people use a run: the gateway and the conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from isthmus.cli.app import Round, RunPath, TrunkAddress, command, notify
from isthmus.cli.terminal import as_utf8


@command("gateway runs/first --port 8000 --api-keys keys.txt")
def gateway(
    run_dir: RunPath,
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    host: Annotated[
        str, typer.Option(help="Where to listen; others than this machine's own need API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--api-keys", help="File of API keys, one a line, that only its owner may read."),
    ] = None,
    together: Annotated[int, typer.Option(min=1, help="Most answers that are written at a time.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Most requests that wait for room; more are turned away.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens, where a request does not say.")
    ] = 1024,
    conversations: Annotated[
        int, typer.Option(min=0, help="Most conversations kept for their next turn, which sends what is new alone.")
    ] = 4,
    trunk: TrunkAddress = None,
    round: Round = None,
) -> None:
    """Serve a run's model to the silo's own people, as OpenAI's API: text stays here."""
    from isthmus.gateway.extra import require_server

    require_server()
    from isthmus.gateway.server import GatewaySettings, serve_gateway
    from isthmus.storage.record import RunDirectory

    settings = GatewaySettings(host, port, api_keys, together, waiting, max_new_tokens, conversations)
    run = RunDirectory.open(run_dir)
    serve_gateway(run, silo, settings, trunk=trunk, round=round, notify=notify, announce=typer.echo)


@command("chat runs/first --max-new-tokens 300")
def chat(
    run_dir: RunPath,
    silo: Annotated[Optional[str], typer.Option(help="Run as this silo; the folder's first by default.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest token at each place.")] = 0.0,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The conversation's first turn; the recipe's by default."),
    ] = None,
    trunk: TrunkAddress = None,
    round: Round = None,
) -> None:
    """Talk with a run's model; in a pipe, each line of the input is a turn. /privacy says what has left the silo."""
    from isthmus.gateway.chat import converse
    from isthmus.storage.record import RunDirectory

    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # what is no text is refused by name
    converse(
        RunDirectory.open(run_dir),
        silo,
        longest=max_new_tokens,
        temperature=temperature,
        system=None if system is None else as_utf8(system),
        trunk=trunk,
        round=round,
        notify=notify,
    )
