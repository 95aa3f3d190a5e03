"""Federations as real processes: written to a folder, started, watched, killed.

A federation here is a tiny Llama, a few rows of made-up words a silo, and a recipe without noise, so that the
same recipe always gives the same adapters.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import tomli_w
import torch

from isthmus.cli.main import main
from isthmus.engines.certificates import has_certificates, make_certificates
from isthmus.engines.local import at_address, create_run
from isthmus.engines.process import LISTENING
from isthmus.engines.roles import run_silo, start_server
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RunDirectory
from tests.conftest import VOCABULARY, save_tiny_model, write_rows

PATIENCE = 150.0
"""Seconds after which something is taken to hang."""

RECIPE = """
seed = 5
threads = 1

[model]
path = "model"
bottom = 1
top = 1

[lora]
rank = 4

[train]
rounds = 5
steps = 40
batch = 2
learning_rate = 1e-2
evaluate = true

[task]
prompt = "{text}"
answer = "{label}"

[boundary]
forward.noise = 0.0
gradient.noise = 0.0
update.noise = 0.0

[wire]
deadline = 140.0  # a process may take long to start where others do

[trunk]
together = 1  # what shares a pass changes last bits, and who is in time to share one is chance

[[silo]]
name = "north"
train = "north.jsonl"
held_out = "north.jsonl"

[[silo]]
name = "south"
train = "south.jsonl"
"""


def write_federation(folder: Path, **sections: Any) -> Path:
    """Model, rows and recipe in a new folder; returns the recipe. ``sections`` are merged over ``RECIPE``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_model("llama", folder / "model")
    for name in ("north", "south"):
        write_rows(folder / f"{name}.jsonl", rows_of(name))
    return write_recipe(folder / "recipe.toml", **sections)


def write_recipe(path: Path, **sections: Any) -> Path:
    values = tomllib.loads(RECIPE)
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(tomli_w.dumps(values))
    return path


def rows_of(name: str, count: int = 12) -> list[dict[str, Any]]:
    """Rows whose label is their first word: a tiny model can learn to repeat it."""
    draw = random.Random(name)
    texts = [[f"w{draw.randrange(4, VOCABULARY)}" for _ in range(draw.randrange(3, 9))] for _ in range(count)]
    return [{"text": " ".join(words), "label": f"{words[0]} {words[-1]}"} for words in texts]


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def failed(self, *told: str) -> None:
        """Assert that it ended with exit code 1 and an error that says all this and names a remedy."""
        assert self.code == 1, self
        assert "\nerror: " in "\n" + self.err, self
        assert "  remedy: " in self.err, self
        assert "Traceback" not in self.out + self.err, self
        for words in told:
            assert words in self.err, self

    def succeeded(self) -> None:
        assert self.code == 0, self
        assert "Traceback" not in self.out + self.err, self


class Command:
    """``isthmus`` with these arguments as a process; its output goes to files, so that nothing blocks on a pipe.

    Args:
        launcher: a module that starts it, with arguments up to its name.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        launcher: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = psutil.Popen(
                [sys.executable, "-m", *launcher, "isthmus", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1", **(environment or {})},
                **options,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def address(self) -> str:
        """Where the server that was started listens, once it does."""
        until(lambda: self.stdout.startswith(LISTENING), "the server to listen", command=self)
        return self.stdout.removeprefix(LISTENING).split()[0]

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def role(self, name: str) -> psutil.Process:
        """The child of ``isthmus run`` that is the trunk or this silo."""
        for child in self.process.children():
            if name in child.cmdline():
                return child
        raise AssertionError(f"no process of {name}")

    def wait(self) -> Ended:
        code = self.process.wait(PATIENCE)
        return Ended(code, self.stdout, self.stderr)

    def end(self) -> None:
        """Kill what is left of it, and what it started: a failed test leaves nothing behind."""
        if self.process.poll() is None:
            for process in (*self.process.children(recursive=True), self.process):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


class Commands:
    """Starts commands and ends those that still run when the test is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Command] = []

    def start(self, *arguments: object, **options: Any) -> Command:
        command = Command(self._folder / f"command-{len(self._started)}", *arguments, **options)
        self._started.append(command)
        return command

    def run(self, *arguments: object, **options: Any) -> Ended:
        return self.start(*arguments, **options).wait()

    def end(self) -> None:
        for command in self._started:
            command.end()


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Ended:
    """``isthmus`` with these arguments in this process."""
    monkeypatch.setattr(sys, "argv", ["isthmus", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return Ended(code, out, err)


def run_here(recipe: Path, run: Path) -> None:
    """What ``isthmus run`` does and leaves, but in this process, each silo in a thread of it.

    For tests of what a federation learns and notes. The roles still talk over gRPC, with certificates; that they can
    be killed, and what their logs say, takes processes.
    """
    train_here(create_run(Recipe.read(recipe), run))


def train_here(run: RunDirectory) -> None:
    """All roles of a run directory's recipe in this process, until the silos are done."""
    with served_here(run) as there, silos_here(there, run):
        pass


@contextmanager
def served_here(run: RunDirectory) -> Iterator[Recipe]:
    """Trunk and root of the run in this process while the block runs; gives the recipe with their address."""
    recipe = run.recipe()
    certificates = Path(recipe.wire.certificates)
    if not has_certificates(recipe, certificates):
        make_certificates(recipe, certificates)
    server, services = start_server(at_address(recipe, "localhost:0"), run, ("trunk", "root"))
    try:
        yield at_address(recipe, f"localhost:{server.port}")
    finally:
        server.stop()
        services["Trunk"].stop()  # type: ignore[attr-defined]


@contextmanager
def silos_here(recipe: Recipe, run: RunDirectory, *names: str) -> Iterator[None]:
    """These silos (all by default), a thread each, from the block's start; once it is over they are waited for."""
    names = names or tuple(silo.name for silo in recipe.silo)
    with ThreadPoolExecutor(len(names)) as threads:
        working = [threads.submit(run_silo, recipe, run, name) for name in names]
        yield
        for done in working:
            done.result(PATIENCE)


def until(condition: Callable[[], object], what: str, *, command: Command | None = None) -> None:
    """Wait for the condition; fail when the command ends first or patience does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if command is not None and command.process.poll() is not None and not condition():
            raise AssertionError(f"ended before {what}: {command.stdout}{command.stderr}")
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def steps_of(run: Path, silo: str) -> list[tuple[int, int]]:
    """(round, step) of the optimizer steps a silo has noted, in the order of noting."""
    lines = read_journal(run / "silos" / silo / "metrics.jsonl")
    return [(line["round"], line["step"]) for line in lines if line["event"] == "step"]


def until_step(run: Path, round: int, step: int, command: Command, *, silo: str = "south") -> None:
    """Wait until the silo is in this round, at this step or later."""
    until(lambda: (round, step) <= max(steps_of(run, silo), default=(0, 0)), f"step {step} of {round}", command=command)


def processes_of(run: Path) -> list[psutil.Process]:
    """All processes with this run directory in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run) in word for word in process.info["cmdline"] or ()) and alive(process):
            found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class SmallDisk:
    """A folder on a disk of its own that can be filled up; where mounting is not permitted, files that cannot grow.

    Not in pytest's own folders: it could not remove one that a killed run of the tests left mounted.
    """

    def __init__(self, *, megabytes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="isthmus-disk-"))
        self._ballast = self.folder / "ballast"
        self._size = f"size={megabytes}m"

    def __enter__(self) -> Self:
        mount = ["mount", "-t", "tmpfs", "-o", self._size, "tmpfs", str(self.folder)]
        self._mounted = subprocess.run(mount, capture_output=True).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        shutil.rmtree(self.folder)

    def fill(self, writers: list[psutil.Process]) -> None:
        """Leave no room for what these processes write."""
        if not self._mounted:
            for writer in writers:
                writer.rlimit(psutil.RLIMIT_FSIZE, (1, 1))
            return
        with self._ballast.open("wb", buffering=0) as file:
            for size in (65536, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


def states(run: Path, number: int) -> dict[str, torch.Tensor]:
    """Every tensor that trunk, root and silos kept after this round: adapters and optimizer states."""
    roles = ["trunk", "root", *(silo.name for silo in RunDirectory.open(run).recipe().silo)]
    return {key: tensor for role in roles for key, tensor in state(run, role, number).items()}


def state(run: Path, role: str, number: int) -> dict[str, torch.Tensor]:
    """Every tensor that one role kept after this round."""
    return dict(_tensors(RunDirectory.open(run).role(role).load_round(number), role))


def _tensors(value: Any, key: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(key, value)]
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in _tensors(item, f"{key}/{name}")]
    return []


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 20
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_no_traceback(run: Path) -> None:
    for log in (run / "logs").iterdir():
        assert "Traceback" not in log.read_text(), log.read_text()
