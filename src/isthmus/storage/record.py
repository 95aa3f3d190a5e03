"""What a run writes: the layout of a run directory, append-only journals, and files that are never half there.

Torch is imported where states are saved and loaded: the engine's own process only watches, and starts at once.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pickle
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.errors import DiskFullError, RunError
from isthmus.recipe import Recipe

ROLES = ("trunk", "root", "edges", "silos")
"""Folders of a run directory that a role makes once its model and identity are in order."""
LOCK_SECONDS = 15.0
LONGEST_LINE = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROUND = re.compile(r"round-(\d{4,})\.pt")


class RunDirectory:
    """One run's files. ``isthmus run`` writes all of it; on real machines each party has a folder with its own part.

    ::

        recipe.toml                       the recipe as it is run, with every key
        lock                              held while a run is under way
        certificates/PARTY/               ca.pem, cert.pem and key.pem, made by the local engine
        logs/ROLE.log                     what each process printed; trunk.log is the trunk's and the root's
        trunk/metrics.jsonl               one line an optimizer step: round, step, silos
        trunk/rounds/round-0003.pt        adapter and optimizers of the trunk after round 3; round 0 is the start
        trunk/kept/SILO/                  examples that a silo released once, as they arrived
        root/metrics.jsonl                one line a round: weights; staleness, shares and clip where there are any
        root/rounds/round-0003.pt         shared adapters after round 3; state of strategy, clip and control
        root/ledger.jsonl, ledger.head    releases of the root, where it adds the noise of sums
        edges/NAME/metrics.jsonl          one line a round: weights
        silos/NAME/metrics.jsonl          one line a step, an evaluation, and a round's fairness
        silos/NAME/ledger.jsonl           one line a release, in a chain of hashes
        silos/NAME/ledger.head            length of the chain, and its last hash
        silos/NAME/records/record-key     key of the records' names in the ledger
        silos/NAME/records/sensitivity.json   scale of the noise, where text is classed
        silos/NAME/released/              examples released once, as they left; ``secret`` is the key of their numbers
        silos/NAME/rounds/round-0003.pt   optimizer, guard, error feedback, fairness and control after round 3
        silos/NAME/draft.safetensors      the distilled draft, after ``isthmus draft``
        attack.json                       results of ``isthmus attack``
        demo.json                         results of ``isthmus demo``

    Files appear whole or not at all; a journal's last line is dropped if it was cut short. Rounds are kept, and none is
    replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """A new run directory holding this recipe. A recipe that no role got to work with is replaced.

        Raises:
            RunError: the directory holds a run already.
        """
        run = cls(path.resolve())
        if any((run.path / role).exists() for role in ROLES):
            raise RunError(
                f"{path} holds a run already", remedy=f"continue it with 'isthmus run --resume {path}' or name another"
            )
        with writing(run.recipe_path) as temporary:
            temporary.write_text(recipe.toml(), encoding="utf-8")
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run directory.

        Raises:
            RunError: there is none at this path.
        """
        run = cls(path.resolve())
        if not run.recipe_path.exists():
            raise RunError(f"{path} is no run directory", remedy="name a folder that 'isthmus run' wrote")
        return run

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.toml"

    def recipe(self) -> Recipe:
        return Recipe.read(self.recipe_path)

    def role(self, name: str) -> RoleDirectory:
        """The folder of ``trunk``, ``root`` or a silo."""
        return RoleDirectory(self.path / name if name in ("trunk", "root") else self.path / "silos" / name)

    def edge(self, name: str) -> RoleDirectory:
        """The folder of an edge."""
        return RoleDirectory(self.path / "edges" / name)

    def completed(self) -> int:
        """The last round that trunk and root both have; a run that was cut off may have one more at the trunk."""
        return min(self.role("trunk").last_round(), self.role("root").last_round())

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the directory against other runs during the block.

        Gives a file descriptor; processes that inherit it hold the directory too, until the last of them ends.

        Raises:
            RunError: it is still held after ``LOCK_SECONDS``.
        """
        with disk_errors(self.path):
            file = (self.path / "lock").open("w")
        with file:
            end = time.monotonic() + LOCK_SECONDS
            while not _lock(file.fileno()):
                if time.monotonic() > end:
                    raise RunError(
                        f"another run is under way in {self.path}", remedy="wait for its end, or stop its processes"
                    )
                time.sleep(0.1)
            yield file.fileno()


class RoleDirectory:
    """One role's files within a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rounds = path / "rounds"

    def journal(self, name: str) -> Journal:
        return Journal(self.path / f"{name}.jsonl")

    def save_round(self, number: int, state: dict[str, Any]) -> None:
        """Keep the state after this round, whole or not at all; older rounds stay."""
        import torch

        content = io.BytesIO()  # torch's own writer hides that the disk is full behind errors of many kinds
        torch.save(state, content)
        with writing(self._rounds / f"round-{number:04d}.pt") as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_round(self, number: int) -> dict[str, Any]:
        """The state after this round.

        Raises:
            RunError: it was never saved or cannot be read.
        """
        import torch

        path = self._rounds / f"round-{number:04d}.pt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return state
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise RunError(f"no state of round {number} in {self.path}", remedy="start a new run") from error

    def last_round(self) -> int:
        """The last round with a saved state; 0 if there is none."""
        return max(self.rounds(), default=0)

    def rounds(self) -> set[int]:
        """All rounds with a saved state."""
        names = self._rounds.iterdir() if self._rounds.is_dir() else ()
        return {int(match[1]) for name in names if (match := ROUND.fullmatch(name.name))}


class Journal:
    """An append-only JSONL file. A last line that a crash or a full disk cut short is dropped when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            _drop_half_line(path)

    def append(self, values: dict[str, Any]) -> None:
        """Write one line, at once."""
        line = memoryview((json.dumps(values) + "\n").encode())
        with disk_errors(self._path), self._path.open("ab", buffering=0) as file:
            while line:
                line = line[file.write(line) :]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none if it is not there. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _drop_half_line(path: Path) -> None:
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:  # new, or a device, which may be endless to read
            return
        start = max(0, size - LONGEST_LINE)
        file.seek(start)
        tail = file.read()
        file.truncate(start + tail.rfind(b"\n") + 1)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about writing ``path`` into an error of ours.

    Raises:
        DiskFullError: there is no room.
        RunError: it cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(path) from error
        raise RunError(
            f"cannot write {path}: {error.strerror}", remedy="name a place this user may write to"
        ) from error


def _full(path: Path) -> DiskFullError:
    return DiskFullError(
        f"no room on the disk for {path}", remedy="free some space, then continue with 'isthmus run --resume'"
    )


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
