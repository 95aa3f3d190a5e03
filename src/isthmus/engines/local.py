"""The local engine: a whole federation as real processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.engines.roles import ADDRESS, make_certificates
from isthmus.errors import IsthmusError, PeerGoneError, RunError
from isthmus.recipe import Recipe
from isthmus.report.record import RunDirectory, writing

START_SECONDS = 300.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2


def run_federation(run: RunDirectory, watch: Callable[[], None] = lambda: None) -> None:
    """Run all roles of the run directory's recipe until the silos are done.

    Args:
        watch: called a few times a second while the federation runs.

    Raises:
        IsthmusError: a role failed; the message is the first failing role's own, the run can be resumed.
    """
    recipe = run.recipe()
    with serving(run, ("trunk", "root")) as (server, address):
        names = [silo.name for silo in recipe.silo]
        silos = {name: _start(run, ["silo", name], name, address) for name in names}
        try:
            _wait(run, recipe, {"trunk": server, **silos}, watch)
        finally:
            _stop(*silos.values())


@contextmanager
def serving(run: RunDirectory, roles: tuple[str, ...] = ("trunk",)) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A trunk (and root) process on a free port while the block runs; gives the process and its address."""
    recipe = run.recipe()
    certificates = Path(recipe.wire.certificates)
    if not (certificates / "trunk").exists():
        make_certificates(recipe, certificates)
    announced = run.role(roles[0]).path / ADDRESS
    announced.unlink(missing_ok=True)
    command = ["trunk", "--with-root"] if "root" in roles else ["trunk"]
    server = _start(run, command, "trunk", "localhost:0")
    try:
        yield server, _address(run, server, announced)
    finally:
        _stop(server)


def local_recipe(recipe: Recipe, run: Path) -> Recipe:
    """The recipe as the local engine runs it: one server for trunk and root, certificates in the run directory."""
    address = recipe.trunk.address
    return recipe.model_copy(
        update={
            "root": recipe.root.model_copy(update={"address": address}),
            "wire": recipe.wire.model_copy(update={"certificates": str(run.resolve() / "certificates")}),
        }
    )


def at_address(recipe: Recipe, address: str) -> Recipe:
    """The recipe with trunk and root at this address."""
    return recipe.model_copy(
        update={
            "trunk": recipe.trunk.model_copy(update={"address": address}),
            "root": recipe.root.model_copy(update={"address": address}),
        }
    )


def log_path(run: RunDirectory, role: str) -> Path:
    return run.path / "logs" / f"{role}.log"


def _start(run: RunDirectory, command: list[str], role: str, address: str) -> subprocess.Popen[bytes]:
    """A role's process, in a session of its own so that Ctrl-C reaches it through us only."""
    log = log_path(run, role)
    log.parent.mkdir(parents=True, exist_ok=True)
    call = [sys.executable, "-m", "isthmus", *command[:1], str(run.recipe_path), *command[1:]]
    call += ["--run-dir", str(run.path), "--address", address]
    # Waiting processes must not spin on the cores that the working one needs.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with log.open("ab") as output:
        return subprocess.Popen(call, stdout=output, stderr=output, start_new_session=True, env=environment)


def _address(run: RunDirectory, server: subprocess.Popen[bytes], announced: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if announced.exists():
            return announced.read_text()
        if server.poll() is not None:
            raise _failure(run, "trunk")
        time.sleep(POLL_SECONDS / 4)
    raise PeerGoneError(f"the trunk did not start within {START_SECONDS:.0f} s", remedy=f"see {log_path(run, 'trunk')}")


def _wait(
    run: RunDirectory, recipe: Recipe, processes: dict[str, subprocess.Popen[bytes]], watch: Callable[[], None]
) -> None:
    """Until the silos are done. Lost silos are borne as long as the recipe's minimum is left."""
    lost: set[str] = set()
    waiting = {silo.name for silo in recipe.silo}
    while waiting:
        watch()
        if processes["trunk"].poll() is not None:
            raise _failure(run, "trunk")
        ended = {name: processes[name].poll() for name in waiting if processes[name].poll() is not None}
        waiting -= ended.keys()
        lost |= {name for name, code in ended.items() if code != 0}
        if lost and len(recipe.silo) - len(lost) < recipe.minimum:
            raise _failure(run, min(lost))
        time.sleep(POLL_SECONDS)
    watch()


def _failure(run: RunDirectory, role: str) -> IsthmusError:
    """What a role that ended had to say: its own error, which is last in its log, or a pointer to it."""
    log = log_path(run, role)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        message = lines[starts[-1]].removeprefix("error: ")
        remedy = "".join(lines[starts[-1] + 1 : starts[-1] + 2]).strip().removeprefix("remedy: ")
        return RunError(f"{role} failed: {message}", remedy=remedy or f"see {log}")
    return RunError(f"{role} ended unexpectedly", remedy=f"see {log}, then 'isthmus run --resume {run.path}'")


def _stop(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


__all__ = ["at_address", "local_recipe", "log_path", "run_federation", "serving", "writing"]
