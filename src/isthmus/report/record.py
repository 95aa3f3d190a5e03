"""What a run writes: the layout of a run directory, append-only journals, and files that are never half there."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import DiskFullError, RunError
from isthmus.recipe import Recipe

ROUND = re.compile(r"round-(\d{4,})\.pt")


class RunDirectory:
    """One run's files.

    ::

        recipe.toml
        certificates/PARTY/          made by the local engine
        trunk/metrics.jsonl          one line an optimizer step
        trunk/rounds/round-0003.pt   adapter and optimizer of the trunk after round 3
        root/metrics.jsonl           one line a round
        root/rounds/round-0003.pt    adapters of the ends after round 3
        silos/NAME/metrics.jsonl     one line a step and an evaluation
        silos/NAME/ledger.jsonl      one line a release
        silos/NAME/rounds/...        optimizer state of the silo after a round
        logs/ROLE.log
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """A new run directory holding this recipe.

        Raises:
            RunError: the directory holds a run already.
        """
        run = cls(path.resolve())
        if run.recipe_path.exists():
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


class RoleDirectory:
    """One role's files within a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rounds = path / "rounds"

    def journal(self, name: str) -> Journal:
        return Journal(self.path / f"{name}.jsonl")

    def save_round(self, number: int, state: dict[str, Any]) -> None:
        """Keep the state after this round, whole or not at all; older rounds stay."""
        with writing(self._rounds / f"round-{number:04d}.pt") as temporary:
            torch.save(state, temporary)

    def load_round(self, number: int) -> dict[str, Any]:
        """The state after this round.

        Raises:
            RunError: it was never saved or cannot be read.
        """
        path = self._rounds / f"round-{number:04d}.pt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return state
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"no state of round {number} in {self.path}", remedy="start a new run") from error

    def last_round(self) -> int:
        """The last round with a saved state; 0 if there is none."""
        names = self._rounds.iterdir() if self._rounds.is_dir() else ()
        return max((int(match[1]) for name in names if (match := ROUND.fullmatch(name.name))), default=0)


class Journal:
    """An append-only JSONL file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def append(self, values: dict[str, Any]) -> None:
        """Write one line, at once."""
        with _disk_errors(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; none if it is not there. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise DiskFullError(
            f"no room on the disk for {path}", remedy="free some space, then continue with 'isthmus run --resume'"
        ) from error


Progress = Callable[[dict[str, Any]], None]
