"""The local engine: a whole federation as real processes on this machine.

Its own process only starts and watches the others; torch and transformers are imported there, not here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.data.templates import read_examples
from isthmus.engines.certificates import complete, make_certificates
from isthmus.engines.lifetime import Stopped
from isthmus.engines.process import RoleProcess, stop
from isthmus.errors import RecipeError
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.storage.record import RunDirectory

START_SECONDS = 300.0
POLL_SECONDS = 0.2
Watch = Callable[[], None]
Tell = Callable[[str], None]


def create_run(recipe: Recipe, path: Path) -> RunDirectory:
    """A new run directory for this recipe, once all silos' data has been looked at.

    Raises:
        DataError: a data file is unusable.
        RunError: the directory already holds a run.
    """
    for silo in recipe.silo:
        for file in (silo.train, silo.held_out):
            if file is not None:
                read_examples(Path(file), recipe.task)
    return RunDirectory.create(path, local_recipe(recipe, path))


def run_federation(run: RunDirectory, watch: Watch = lambda: None, tell: Tell = lambda message: None) -> None:
    """Run all roles of the run directory's recipe until the silos are done.

    Args:
        watch: called a few times a second while the federation runs.
        tell: gets a sentence for each silo that is lost while the recipe's minimum lets the others go on.

    Raises:
        IsthmusError: a role failed; the message is the first failing role's own, the run can be resumed.
        Stopped: SIGINT or SIGTERM came; the run can be resumed.
    """
    recipe = run.recipe()
    try:
        with run.locked() as lock, serving(run, ("trunk", "root"), lock) as (server, address), _ending() as others:
            moved = _start_edges(run, recipe, address, others, lock)
            edges = list(others)
            for silo in recipe.silo:
                arguments = ["silo", str(run.recipe_path), silo.name, "--trunk", address, "--root", address, *moved]
                others.append(_start(run, f"silo {silo.name}", silo.name, arguments, lock))
            _wait(recipe.tree.fewest(), server, edges, others[len(edges) :], watch, tell)
    except (Stopped, KeyboardInterrupt):
        raise Stopped(f"stopped; continue with 'isthmus run --resume {run.path}'") from None


@contextmanager
def serving(
    run: RunDirectory, roles: Collection[str] = ("trunk",), lock: int | None = None
) -> Iterator[tuple[RoleProcess, str]]:
    """A trunk (and root) process on a free port while the block runs; gives the process and its address."""
    recipe = run.recipe()
    certificates = Path(recipe.wire.certificates)
    if not complete(recipe, certificates):
        make_certificates(recipe, certificates)
    arguments = ["trunk", str(run.recipe_path), "--address", "localhost:0"]
    arguments += ["--with-root"] if "root" in roles else []
    with _ending() as servers:
        servers.append(_start(run, "the trunk", "trunk", arguments, lock))
        yield servers[0], servers[0].wait_listening(START_SECONDS)


def local_recipe(recipe: Recipe, run: Path) -> Recipe:
    """The recipe as the local engine runs it: one server for trunk and root, certificates in the run directory."""
    address = recipe.trunk.address
    return recipe.model_copy(
        update={
            "root": recipe.root.model_copy(update={"address": address}),
            "wire": recipe.wire.model_copy(update={"certificates": str(run.resolve() / "certificates")}),
        }
    )


def at_address(recipe: Recipe, address: str | None, roles: Collection[str] = ("trunk", "root")) -> Recipe:
    """The recipe with these servers, ``trunk``, ``root`` or edges, at this address; None leaves it as it is."""
    if address is None:
        return recipe
    new = {"address": address}
    moved = {role: getattr(recipe, role).model_copy(update=new) for role in ("trunk", "root") if role in roles}
    edges = tuple(edge.model_copy(update=new) if edge.name in roles else edge for edge in recipe.edge)
    return recipe.model_copy(update={**moved, "edge": edges})


def at_edge(recipe: Recipe, told: str) -> Recipe:
    """The recipe with an edge at another address, told as ``NAME=host:port``.

    Raises:
        RecipeError: it is told otherwise, or the recipe has no such edge.
    """
    name, _, address = told.partition("=")
    if not address:
        raise RecipeError(f"--edge {told}: no address is named", remedy="write --edge NAME=host:port")
    recipe.tree.node(name)
    return at_address(recipe, address, (name,))


def _start_edges(
    run: RunDirectory, recipe: Recipe, root: str, started: list[RoleProcess], lock: int | None
) -> list[str]:
    """Start the edges on free ports, those above first; the arguments that tell a silo where they are."""
    addresses = {ROOT: root}
    while len(addresses) <= len(recipe.edge):
        for edge in recipe.edge:
            parent = recipe.tree.parent(edge.name)
            if edge.name in addresses or parent not in addresses:
                continue
            arguments = ["edge", str(run.recipe_path), edge.name, "--address", "localhost:0"]
            arguments += ["--parent", addresses[parent]]
            started.append(_start(run, f"edge {edge.name}", edge.name, arguments, lock))
            addresses[edge.name] = started[-1].wait_listening(START_SECONDS)
    return [word for edge in recipe.edge for word in ("--edge", f"{edge.name}={addresses[edge.name]}")]


def _start(run: RunDirectory, title: str, role: str, arguments: list[str], lock: int | None) -> RoleProcess:
    inherited = () if lock is None else (lock,)
    return RoleProcess(title, [*arguments, "--run-dir", str(run.path)], run.path / "logs" / f"{role}.log", inherited)


@contextmanager
def _ending() -> Iterator[list[RoleProcess]]:
    """A list for processes, all of which are ended with the block."""
    processes: list[RoleProcess] = []
    try:
        yield processes
    finally:
        stop(*processes)


def _wait(
    minimum: int,
    server: RoleProcess,
    edges: list[RoleProcess],
    silos: list[RoleProcess],
    watch: Watch,
    tell: Tell,
) -> None:
    """Until the silos are done. Lost silos are borne as long as this many are left; lost edges as long as silos are."""
    waiting, left = list(silos), len(silos)
    while waiting:
        watch()
        if server.poll() is not None:
            raise server.failure()
        for edge in [edge for edge in edges if edge.poll() is not None]:
            edges.remove(edge)
            tell(edge.failure().message)
        for silo in [silo for silo in waiting if silo.poll() is not None]:
            waiting.remove(silo)
            if silo.poll() == 0:
                continue
            left -= 1
            if left < minimum:
                raise silo.failure()
            tell(f"{silo.failure().message}; going on with {left} of {len(silos)} silos")
        time.sleep(POLL_SECONDS)
    watch()
