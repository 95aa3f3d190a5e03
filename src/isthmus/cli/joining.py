"""Commands of joining: the authority of who leads a federation, invites, and the party that takes one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from isthmus.cli.app import AsJson, MetricsAddress, RecipePath, app, command, finish, notes_aside, notify, print_json

authority = typer.Typer(no_args_is_help=True, help="The federation's authority, which says who is a party.")
app.add_typer(authority, name="authority")

LONGEST_PATH = 255
"""Characters of a word that may name a file."""
Folder = Annotated[Path, typer.Option("--authority", help="The authority's folder.")]


@command("authority init recipe.toml", name="init", group=authority)
def init_authority(
    recipe: RecipePath,
    folder: Annotated[Path, typer.Argument(help="The folder to make.")] = Path("authority"),
    server: Annotated[
        str, typer.Option(help="Who answers invites: trunk, root, or authority, a server of its own.")
    ] = "trunk",
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="host:port at which that server is reached; the recipe's by default."),
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Validity of a certificate; it is renewed by itself.")] = 90.0,
    as_json: AsJson = False,
) -> None:
    """Make the authority of a federation, once."""
    from isthmus.joining.authority_folder import AuthorityFolder

    made = AuthorityFolder.create(folder, recipe, server=server, address=address, days=days)
    read = made.recipe()
    both = " --with-root" if server == "trunk" and read.trunk.address == read.root.address else ""
    serve = f"isthmus authority serve {folder}"
    if server != "authority":
        serve = f"isthmus {server} {recipe}{both} --authority {folder}"
    text = f"authority: {folder}, fingerprint {made.fingerprint} (who has key.pem can be anyone: keep it, copy it)"
    values = {"authority": folder, "fingerprint": made.fingerprint}
    finish(values, as_json, text, following=f"{serve}; isthmus invite NAME")


@command("authority serve authority --address 0.0.0.0:50052", name="serve", group=authority)
def serve_guests(
    folder: Annotated[Path, typer.Argument(help="The authority's folder.")] = Path("authority"),
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="host:port to listen at; that of the invites by default."),
    ] = None,
    metrics: MetricsAddress = None,
) -> None:
    """Answer invites and renewals by a server of its own."""
    from isthmus.engines.monitor import monitored
    from isthmus.engines.roles import serve_authority

    with monitored("authority", metrics) as monitor:
        serve_authority(folder, address, monitor)


@command("authority show authority", name="show", group=authority)
def show_authority(
    folder: Annotated[Path, typer.Argument(help="The authority's folder.")] = Path("authority"),
    as_json: AsJson = False,
) -> None:
    """Show who has joined, until when, and which invites are open."""
    from rich.console import Console

    from isthmus.joining.authority_folder import AuthorityFolder
    from isthmus.report.party_table import party_lines, show_parties

    authority = AuthorityFolder(folder)
    if not as_json:
        show_parties(authority, Console())
    parties = [asdict(line) for line in party_lines(authority)]
    values = {"authority": folder, "fingerprint": authority.fingerprint, "parties": parties}
    finish(values, as_json, following="isthmus invite NAME; isthmus revoke NAME")


@command("invite north")
def invite(
    names: Annotated[list[str], typer.Argument(help="Silos or edges of the recipe, trunk or root.")],
    folder: Folder = Path("authority"),
    days: Annotated[float, typer.Option(min=0.001, help="Validity in days.")] = 7.0,
    as_json: AsJson = False,
) -> None:
    """Print an invite for each party: one line, which works once."""
    from isthmus.joining.authority_folder import AuthorityFolder
    from isthmus.recipe.address import is_loopback

    authority = AuthorityFolder(folder)
    if is_loopback(authority.address):
        notify(f"note: {authority.address} is reached from this machine alone; write trunk.address into the recipe")
    for name in names:
        authority.recipe().tree.role(name)  # all of them, or none is invited
    invites = {}
    for name in names:
        made = authority.invite(name, days=days)
        invites[name] = str(made)
        notify(f"for {name} ({made.role}) at {made.address}, until {made.expires:%Y-%m-%d %H:%M} UTC; works once:")
        typer.echo(made, err=as_json)
    notify("Give each to its party alone: by a call, an encrypted message, in person.")
    notify("next, on their machine: isthmus join INVITE, a silo with --train ROWS")
    if as_json:
        print_json({"invites": invites})


@command("join isthmus:AAOlj7rG... --train notes.csv --folder north", name="join")
def take_invite(
    invite: Annotated[str, typer.Argument(help="The invite, a file that holds it, or - for standard input.")],
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The folder to make; named as the party by default."),
    ] = None,
    train: Annotated[Optional[list[str]], typer.Option(help="File of this silo's rows; repeatable.")] = None,  # noqa: UP045
    held_out: Annotated[Optional[list[str]], typer.Option(help="File of rows to measure on; repeatable.")] = None,  # noqa: UP045
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Check this machine and the servers at the end, as 'doctor'.")
    ] = True,
    run: Annotated[bool, typer.Option("--run", help="Then run this silo until the federation has finished.")] = False,
    as_json: AsJson = False,
) -> None:
    """Join a federation: make a key here, get a certificate, the recipe and this silo's parts of the model."""
    from isthmus.joining.join import OwnFiles, join_federation
    from isthmus.wire.invite import INVITE_PREFIX, Invite

    if invite == "-":
        invite = sys.stdin.readline()
    elif not invite.startswith(INVITE_PREFIX) and len(invite) < LONGEST_PATH and Path(invite).is_file():
        invite = Path(invite).read_text()
    invited = Invite.parse(invite)
    files = OwnFiles(tuple(train or ()), tuple(held_out or ()))
    joined = join_federation(invited, folder or Path(invited.name), files, notify)
    run_dir = joined.folder / "run"
    named = f" {invited.name}" if invited.role in ("silo", "edge") else ""
    values = {"party": invited.name, "role": invited.role, "folder": joined.folder, "recipe": joined.recipe}
    if not as_json:
        typer.echo(f"joined as {invited.name}: {joined.folder}")
    elif not check:
        print_json(values)
    if check:
        _examine(joined.recipe, invited.name, run_dir, as_json=as_json, values=values)
    if run and invited.role == "silo":
        from isthmus.cli.roles import silo

        with notes_aside(as_json):
            silo(joined.recipe, invited.name, run_dir)
        return
    typer.echo(f"next: isthmus {invited.role} {joined.recipe}{named} --run-dir {run_dir}", err=as_json)


@command("revoke north")
def revoke(
    name: Annotated[str, typer.Argument(help="The party.")],
    folder: Folder = Path("authority"),
    as_json: AsJson = False,
) -> None:
    """Revoke a party's certificates and invites: its open streams end at once."""
    from isthmus.joining.authority_folder import AuthorityFolder

    count = AuthorityFolder(folder).revoke(name)
    text = f"revoked: {name} ({count} certificate{'' if count == 1 else 's'} and invites)"
    follows = f"isthmus invite {name}, if it is to come back with a new key"
    finish({"name": name, "certificates": count}, as_json, text, following=follows)


@command("doctor north/recipe.toml north")
def doctor(
    recipe: RecipePath,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A silo or edge of the recipe, trunk or root; the one whose certificate is here."),
    ] = None,
    run_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where the party writes, for the check of the disk; the recipe's folder by default."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run/--no-dry-run", help="Take ten steps of a silo that train nothing.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Check a party on its own machine, and say in words what is wrong: certificate, servers, clock, disk, memory."""
    _examine(recipe, name, run_dir, dry_run, as_json)


def _examine(
    recipe: Path,
    name: str | None,
    run_dir: Path | None,
    dry_run: bool = True,
    as_json: bool = False,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Print what the doctor finds; exit with 1 if a check failed.

    Args:
        values: what else the JSON object has.
    """
    from rich.console import Console

    from isthmus.engines.doctor import diagnose
    from isthmus.report.doctor_table import show_diagnosis

    found = diagnose(recipe, name, run_dir=run_dir, dry=dry_run, notify=notify)
    if as_json:
        print_json({**(values or {}), **asdict(found), "failed": found.failed})
    else:
        show_diagnosis(found, Console())
    if found.failed:
        raise typer.Exit(1)
