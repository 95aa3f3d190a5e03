"""The local engine: a whole federation as processes on this machine.

The engine's own process starts and watches the others. It does not import torch or transformers, unless the recipe
refuses long rows, whose tokens are counted before anything starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.data.examples import check_examples
from isthmus.engines.certificates import has_certificates, make_certificates
from isthmus.engines.lifetime import Stopped
from isthmus.engines.process import RoleProcess, stop
from isthmus.errors import RecipeError, RunError
from isthmus.recipe import Recipe
from isthmus.recipe.address import checked_address
from isthmus.recipe.tree import ROOT
from isthmus.storage.record import RunDirectory

START_SECONDS = 300.0
"""Longest time that a server may take to start."""
POLL_SECONDS = 0.2
"""Time between two checks of the processes."""


def create_run(recipe: Recipe, path: Path) -> RunDirectory:
    """Create a run directory for this recipe, after all silos' data files have been checked.

    Raises:
        DataError: a row or data file is unusable, refused by the model's chat template, or longer than the recipe
            allows; all of them are counted.
        ModelError: rows are conversations, and the model has no chat template.
        RecipeError: the recipe's cut is not chosen yet.
        RunError: the directory already holds a run.
    """
    recipe.require_cut()
    check_examples(recipe)
    if recipe.train.long_rows == "refuse" or recipe.task.chat or recipe.task.messages:
        from isthmus.engines.data_check import check_lengths

        check_lengths(recipe)
    return RunDirectory.create(path, local_recipe(recipe, path))


def open_resumed(path: Path) -> RunDirectory:
    """The run directory of a run to continue.

    Raises:
        RunError: the folder is not a run directory, or one party's own, whose role is started again by itself.
    """
    run = RunDirectory.open(path)
    if run.deployed:
        raise RunError(
            f"{run.path} is the folder of a party that ran by itself",
            remedy="start its role again, such as 'isthmus silo RECIPE NAME --run-dir DIR'",
        )
    run.completed()  # warns here of damaged rounds that the roles pass over: their own warnings go to their logs
    return run


def run_federation(
    run: RunDirectory,
    watch: Callable[[], None] = lambda: None,
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Run all roles of the run directory's recipe until all silos have finished. Where the recipe moves the cut, they
    end after that round and begin anew.

    Args:
        watch: called several times a second while the federation runs.
        notify: called with a message for each edge or silo that fails while enough silos are left to continue.

    Raises:
        IsthmusError: a role failed; the message is that role's. The run can be resumed.
        Stopped: SIGINT or SIGTERM arrived. The run can be resumed.
    """
    _move_cut(run)
    _run_phase(run, watch, notify)
    while not run.role("root").ended_early and _move_cut(run):
        _run_phase(run, watch, notify)


def _move_cut(run: RunDirectory) -> bool:
    """Move the cut if that is due. Returns whether it moved."""
    if not run.recipe().model.moves:
        return False
    from isthmus.engines.repartition import move_if_due

    with run.locked():
        return move_if_due(run)


def _run_phase(run: RunDirectory, watch: Callable[[], None], notify: Callable[[str], None]) -> None:
    """Run all roles until the silos have finished, or the cut is to move."""
    recipe = run.recipe()
    try:
        with run.locked() as lock, serving(run, ("trunk", "root"), lock) as (server, address), _ending() as others:
            moved = _start_edges(run, recipe, address, others, lock)
            edges = list(others)
            for silo in recipe.silo:
                arguments = ["silo", str(run.recipe_path), silo.name, "--trunk", address, "--root", address, *moved]
                others.append(_start(run, f"silo {silo.name}", silo.name, arguments, lock))
            _wait(recipe.tree.fewest(), server, edges, others[len(edges) :], watch, notify)
    except (Stopped, KeyboardInterrupt):
        raise Stopped(f"stopped; continue with 'isthmus run --resume {run.path}'") from None


@contextmanager
def serving(
    run: RunDirectory, roles: Collection[str] = ("trunk",), lock: int | None = None, number: int | None = None
) -> Iterator[tuple[RoleProcess, str]]:
    """A server process on a free port while the block runs; yields the process and its address ``host:port``.

    Args:
        roles: ``trunk``, or ``trunk`` and ``root``.
        lock: file descriptor of the run directory's lock, for the process to inherit.
        number: the round whose adapter the trunk serves; None: the last one.

    Raises:
        IsthmusError: the server did not start.
    """
    recipe = run.recipe()
    certificates = Path(recipe.wire.certificates)
    if certificates.parent == run.path and not has_certificates(recipe, certificates):  # never a deployed party's
        make_certificates(recipe, certificates)
    arguments = ["trunk", str(run.recipe_path), "--address", "localhost:0"]
    arguments += ["--with-root"] if "root" in roles else []
    arguments += ["--round", str(number)] if number is not None else []
    with _ending() as servers:
        servers.append(_start(run, "the trunk", "trunk", arguments, lock))
        yield servers[0], servers[0].wait_listening(START_SECONDS)


def local_recipe(recipe: Recipe, run: Path) -> Recipe:
    """The recipe for the local engine: trunk and root at one address, certificates in the run directory."""
    address = recipe.trunk.address
    return recipe.model_copy(
        update={
            "root": recipe.root.model_copy(update={"address": address}),
            "wire": recipe.wire.model_copy(update={"certificates": str(run.resolve() / "certificates")}),
        }
    )


def at_address(recipe: Recipe, address: str | None, roles: Collection[str] = ("trunk", "root")) -> Recipe:
    """The recipe with other addresses.

    Args:
        address: ``host:port``; None: the recipe is returned unchanged.
        roles: the servers at this address: ``trunk``, ``root``, or names of edges.

    Raises:
        RecipeError: it is no ``host:port``; port 0 is allowed, for a server that chooses a free one.
    """
    if address is None:
        return recipe
    new = {"address": checked_address(address, any_port=True)}
    moved = {role: getattr(recipe, role).model_copy(update=new) for role in ("trunk", "root") if role in roles}
    edges = tuple(edge.model_copy(update=new) if edge.name in roles else edge for edge in recipe.edge)
    return recipe.model_copy(update={**moved, "edge": edges})


def at_trunks(recipe: Recipe, addresses: str | None) -> Recipe:
    """The recipe of who uses a run, with other trunks that serve it, in place of all of its own.

    Args:
        addresses: ``host:port``, of several replicas with commas between; None: the recipe is returned unchanged.

    Raises:
        RecipeError: one is no ``host:port``.
    """
    if addresses is None:
        return recipe
    address, *replicas = map(checked_address, addresses.split(","))
    trunk = recipe.trunk.model_copy(update={"address": address, "replicas": tuple(replicas)})
    return recipe.model_copy(update={"trunk": trunk})


def at_edge(recipe: Recipe, option: str) -> Recipe:
    """The recipe with one edge at another address.

    Args:
        option: ``NAME=host:port``, the value of ``--edge``.

    Raises:
        RecipeError: the option has no address, or the recipe has no such edge.
    """
    name, _, address = option.partition("=")
    if not address:
        raise RecipeError(f"--edge {option} has no address", remedy="write --edge NAME=host:port")
    recipe.tree.node(name)
    return at_address(recipe, address, (name,))


def _start_edges(
    run: RunDirectory, recipe: Recipe, root: str, started: list[RoleProcess], lock: int | None
) -> list[str]:
    """Start the edges on free ports, parents first; returns the ``--edge`` arguments for silos."""
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
    """A list for processes. All of them are stopped when the block ends."""
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
    watch: Callable[[], None],
    notify: Callable[[str], None],
) -> None:
    """Wait until all silos have finished. Edges may fail, and silos as long as ``minimum`` of them are left.

    Raises:
        IsthmusError: the server failed, or too many silos.
    """
    waiting, left = list(silos), len(silos)
    while waiting:
        watch()
        if server.poll() is not None:
            raise server.failure()
        for edge in [edge for edge in edges if edge.poll() is not None]:
            edges.remove(edge)
            notify(edge.failure().message)
        for silo in [silo for silo in waiting if silo.poll() is not None]:
            waiting.remove(silo)
            if silo.poll() == 0:
                continue
            left -= 1
            if left < minimum:
                raise silo.failure()
            notify(f"{silo.failure().message}; going on with {left} of {len(silos)} silos")
        time.sleep(POLL_SECONDS)
    watch()
