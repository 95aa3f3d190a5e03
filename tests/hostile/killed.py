"""Federations whose roles are processes of their own, one of which is killed before a chosen write or state change.

The roles are forked from this process, which has imported everything, so that a federation takes seconds. A role that
ends before its work is done is started again, as a service manager does; nobody else does anything. A kill comes before
the n-th of: opening a file for writing, renaming, removing or cutting one, a write or a sync of a descriptor, and a
line in the log, by which roles tell changes of state.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.engines.certificates import make_certificates
from isthmus.engines.roles import run_silo, serve_edge, serve_roles
from isthmus.errors import IsthmusError
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.integration.processes import assert_same, free_port, states, write_federation

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.truncate", "os.mkdir")
DESCRIPTORS = ("write", "pwrite", "fsync", "fdatasync", "ftruncate")
ROUNDS = 2
PATIENCE, STARTS = 240.0, 12
"""Seconds after which a federation is taken to hang; starts of one role after which it is taken not to recover."""


def plain(folder: Path) -> Recipe:
    """Two silos, trunk and root."""
    return _recipe(folder)


def masked(folder: Path) -> Recipe:
    """Three silos whose updates are summed under masks by an edge, trunk and root."""
    rows = {"train": "south.jsonl", "held_out": "north.jsonl"}
    silos = [{"name": "north", **rows}, {"name": "south", **rows}, {"name": "west", **rows}]
    edge = {"name": "ward", "address": f"localhost:{free_port()}", "silos": ["north", "south", "west"]}
    return _recipe(
        folder, silo=silos, edge=[edge | {"minimum": 3}], federation={"secure": {"masks": True, "range": 0.5}}
    )


def moved(folder: Path) -> Recipe:
    """Two silos, trunk and root, whose cut moves after the first round: a block to the silos, and one to the trunk,
    which waits for the moments of a silo that is killed."""
    model = {"bottom": 1, "top": 2, "moves": [{"after": 1, "bottom": 2, "top": 1}]}
    return _recipe(folder, 60.0, model=model)


def _recipe(folder: Path, round: float = 2.0, **sections: Any) -> Recipe:
    """Two rounds of two steps, with certificates and fixed addresses, so that a role can come back.

    Args:
        round: seconds that trunk and root wait for others at a round's end.
    """
    path = write_federation(
        folder,
        train={"rounds": ROUNDS, "steps": 2},
        trunk={"address": f"localhost:{free_port()}", "patience": 2.0},
        root={"address": f"localhost:{free_port()}", "patience": round},
        wire={"deadline": 30.0, "certificates": "certificates"},
        **sections,
    )
    recipe = Recipe.read(path)
    make_certificates(recipe, folder / "certificates")
    return recipe


def assert_whole(recipe: Recipe, folder: Path, undisturbed: Path) -> None:
    """The result is that of a federation that nobody killed, and all that was written can be read.

    It is the same to the bit; under masks but for each silo's random rounding to the ring.
    """
    if recipe.federation.secure.masks:
        shared, expected = (
            RunDirectory(one / "run").role("root").load_round(ROUNDS)["shared"] for one in (folder, undisturbed)
        )
        assert all((shared[key] - expected[key]).abs().max() < 1e-3 for key in expected)
    else:
        assert_same(states(folder / "run", ROUNDS), states(undisturbed / "run", ROUNDS))
    rounds = [line["round"] for line in read_journal(folder / "run" / "root" / "metrics.jsonl")]
    assert rounds == list(range(1, ROUNDS + 1)), "each round has one line"
    for silo in recipe.silo:
        role = RunDirectory(folder / "run").role(silo.name)
        assert list(read_ledger(role.path / "ledger.jsonl").releases())
        assert read_journal(role.path / "metrics.jsonl")
    for log in folder.glob("*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()


def roles_of(recipe: Recipe) -> dict[str, Callable[[RunDirectory], None]]:
    """What each role's command does, by name: the servers first, then the silos."""
    served: dict[str, Callable[[RunDirectory], None]] = {
        "trunk": lambda run: serve_roles(recipe, run, ("trunk",)),
        "root": lambda run: serve_roles(recipe, run, ("root",)),
    }
    for edge in recipe.edge:
        served[edge.name] = lambda run, name=edge.name: serve_edge(recipe, run, name)  # type: ignore[misc]
    for silo in recipe.silo:
        served[silo.name] = lambda run, name=silo.name: run_silo(recipe, run, name)  # type: ignore[misc]
    return served


@dataclass
class Outcome:
    """How a federation ended."""

    finished: bool
    events: int = 0
    """Writes and state changes of the role that was counted; known only if it was not killed."""
    killed: bool = False
    starts: dict[str, int] = field(default_factory=dict)


def federate(recipe: Recipe, folder: Path, role: str, at: int | None) -> Outcome:
    """All roles until the silos have finished, in ``folder/run``.

    Args:
        role: the one that is killed, or counted.
        at: the event before which its first process is killed; None: it is counted.
    """
    run, roles = RunDirectory(folder / "run"), roles_of(recipe)
    run.record(recipe)
    silos = {silo.name for silo in recipe.silo}
    outcome = Outcome(False, starts=dict.fromkeys(roles, 1))
    running = {name: _fork(name, work, run, folder, _Kill(role == name, at)) for name, work in roles.items()}
    end = time.monotonic() + PATIENCE
    try:
        while silos & running.keys() and time.monotonic() < end:
            for name, process in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if not ended:
                    continue
                del running[name]
                outcome.killed |= os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                if status and outcome.starts[name] < STARTS:
                    outcome.starts[name] += 1
                    running[name] = _fork(name, roles[name], run, folder, None)
                elif status:
                    return outcome
            time.sleep(0.005)
        outcome.finished = not silos & running.keys()
    finally:
        for process in running.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    if at is None:
        outcome.events = int((folder / f"{role}.count").read_text())
    return outcome


@dataclass
class _Kill:
    """Counts what a process writes and says; at a chosen event it is killed."""

    wanted: bool
    at: int | None
    count: int = 0
    place: Path = Path()

    def event(self) -> None:
        self.count += 1
        if self.at == self.count:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at is None:
            _WRITTEN["pwrite"](self.descriptor, f"{self.count:8}".encode(), 0)

    def install(self, place: Path) -> None:
        self.descriptor = os.open(place, os.O_WRONLY | os.O_CREAT)

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            if name in CHANGES or (name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
                self.event()

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.event()
                return original(*arguments, **named)

            return call

        for name in DESCRIPTORS:
            setattr(os, name, counted(_WRITTEN[name]))
        sys.addaudithook(audit)
        handler = logging.Handler()
        handler.emit = lambda record: self.event()  # type: ignore[method-assign]
        logging.getLogger("isthmus").addHandler(handler)


_WRITTEN = {name: getattr(os, name) for name in DESCRIPTORS}


def _fork(name: str, work: Callable[[RunDirectory], None], run: RunDirectory, folder: Path, kill: _Kill | None) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.basicConfig(stream=sys.stderr, force=True)
        logging.getLogger("isthmus").setLevel(logging.INFO)
        if kill is not None and kill.wanted:
            kill.install(folder / f"{name}.count")
        work(run)
        code = 0
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def kill_in_turn(name: str, roles: Sequence[str], times: int, folder: Path) -> None:
    """Kill each of these roles so many times, evenly over its events, and assert that the result is the same."""
    recipe = FEDERATIONS[name](folder / "federation")
    for role in roles:
        undisturbed = folder / role
        undisturbed.mkdir()
        events = federate(recipe, undisturbed, role, None).events
        assert events > 10
        for at in range(events // (times + 1), events, events // times):
            kill_at(recipe, folder, role, at, undisturbed)


def kill_at(recipe: Recipe, folder: Path, role: str, at: int, undisturbed: Path) -> None:
    """Kill a role at this event. How often a role says that it waits differs from run to run: where it had fewer
    events in all, it is killed at an earlier one, in another run."""
    for event in range(at, 0, -max(1, at // 8)):
        place = folder / f"{role}-{event}-of-{at}"
        place.mkdir()
        outcome = federate(recipe, place, role, event)
        assert outcome.finished
        assert_whole(recipe, place, undisturbed)
        if outcome.killed:
            return
    raise AssertionError(f"{role} was never killed")


FEDERATIONS = {"plain": plain, "masked": masked, "moved": moved}

if __name__ == "__main__":  # a process of its own: what has used gRPC cannot be forked
    kill_in_turn(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), Path(sys.argv[4]))
