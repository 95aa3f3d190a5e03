"""Commands of one party each, on real machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from isthmus.cli.app import Address, AsJson, MetricsAddress, RecipePath, RunOption, Served, command, finish
from isthmus.cli.log import log_as

if TYPE_CHECKING:
    from isthmus.joining.authority_folder import AuthorityFolder

AuthorityOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--authority", help="The authority's folder: answer invites here, and make this role's certificate."),
]


FlowerSocket = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--flower", help="The Unix socket at which to meet the app of 'isthmus flower'."),
]


def _folder_of(authority: Path | None) -> AuthorityFolder | None:
    from isthmus.joining.authority_folder import AuthorityFolder

    return None if authority is None else AuthorityFolder(authority)


@command("trunk recipe.toml --with-root --address 0.0.0.0:50051")
def trunk(
    recipe: Served,
    run_dir: RunOption = Path("runs/trunk"),
    address: Address = None,
    with_root: Annotated[bool, typer.Option(help="Serve the root too, at the same address.")] = False,
    round: Annotated[Optional[int], typer.Option(min=0, help="The round to serve; the last by default.")] = None,  # noqa: UP045
    replica: Annotated[
        bool, typer.Option("--replica", help="One of several trunks that serve this finished run; it trains nothing.")
    ] = False,
    authority: AuthorityOption = None,
    metrics: MetricsAddress = None,
    flower: FlowerSocket = None,
) -> None:
    """Serve the trunk, the middle blocks of the model: for a federation, or to use a finished run. By torchrun, several
    processes share its blocks."""
    from isthmus.engines.monitor import monitored
    from isthmus.engines.rank_place import RankPlace
    from isthmus.engines.roles import Serving, serve
    from isthmus.engines.torchrun import follow_rank_0, leading

    place = RankPlace.find()
    if place is not None and place.rank:
        log_as(f"trunk rank {place.rank}")
        follow_rank_0(place, recipe)
        return
    log_as("both" if with_root else "trunk")
    roles = ("trunk", "root") if with_root else ("trunk",)
    with monitored("+".join(roles), metrics) as monitor, leading(place, recipe) as ranks:
        how = Serving(round, _folder_of(authority), monitor, flower, replica, ranks)
        serve(recipe, run_dir, roles, address, how)


@command("root recipe.toml --run-dir runs/root")
def root(
    recipe: Served,
    run_dir: RunOption = Path("runs/root"),
    address: Address = None,
    authority: AuthorityOption = None,
    metrics: MetricsAddress = None,
    flower: FlowerSocket = None,
) -> None:
    """Serve the root, which leads the rounds and aggregates the silos' updates."""
    from isthmus.engines.monitor import monitored
    from isthmus.engines.roles import Serving, serve

    log_as("root")
    with monitored("root", metrics) as monitor:
        how = Serving(authority=_folder_of(authority), monitor=monitor, flower=flower)
        serve(recipe, run_dir, ("root",), address, how)


@command("edge recipe.toml west --run-dir runs/west")
def edge(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(help="This edge's name in the recipe.")],
    run_dir: RunOption = Path("runs/edge"),
    address: Address = None,
    parent: Address = None,
    metrics: MetricsAddress = None,
) -> None:
    """Serve an edge, which sums the updates of its silos and sends the sum to its parent."""
    from isthmus.engines.local import at_address
    from isthmus.engines.monitor import monitored
    from isthmus.engines.roles import recorded, serve_edge
    from isthmus.recipe import Recipe

    log_as(f"edge {name}")
    read = Recipe.read(recipe)
    read.tree.node(name)
    read = at_address(read, parent, (read.tree.parent(name),))
    run = recorded(recipe, read, run_dir)
    with monitored(f"edge {name}", metrics) as monitor:
        serve_edge(at_address(read, address, (name,)), run, name, monitor)


@command("silo recipe.toml north --run-dir runs/north")
def silo(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(help="This silo's name in the recipe.")],
    run_dir: RunOption = Path("runs/silo"),
    trunk: Address = None,
    root: Address = None,
    edge: Annotated[Optional[list[str]], typer.Option(help="An edge's address as NAME=host:port; repeatable.")] = None,  # noqa: UP045
    flower: FlowerSocket = None,
) -> None:
    """Run one silo, which trains on its own text."""
    from isthmus.engines.local import at_address, at_edge
    from isthmus.engines.roles import recorded, run_silo
    from isthmus.recipe import Recipe

    log_as(f"silo {name}")
    read = at_address(at_address(Recipe.read(recipe), trunk, ("trunk",)), root, ("root",))
    for option in edge or ():
        read = at_edge(read, option)
    read.party(name)
    run_silo(read, recorded(recipe, read, run_dir, name), name, flower)


@command("certificates recipe.toml")
def certificates(recipe: RecipePath, as_json: AsJson = False) -> None:
    """Make a certificate for every party of a recipe, in the folder that the recipe names."""
    from isthmus.engines.certificates import make_certificates
    from isthmus.recipe import Recipe

    read = Recipe.read(recipe, undecided=True)
    make_certificates(read, Path(read.wire.certificates))
    parties = ["trunk", "root", *read.tree.parties]
    text = f"certificates: {read.wire.certificates} (give each party its own folder and no other)"
    follows = f"isthmus trunk {recipe} --with-root; isthmus silo {recipe} NAME"
    finish({"folder": read.wire.certificates, "parties": parties}, as_json, text, following=follows)
