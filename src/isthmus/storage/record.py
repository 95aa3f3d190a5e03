"""Run directories: their layout, their locks, and the states of rounds in them.

Torch is imported only where states are saved and loaded, so that the process that starts and watches the roles starts
fast.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.errors import RunError
from isthmus.recipe import Recipe, TrainSection
from isthmus.recipe.recipe import with_checksum
from isthmus.storage.files import PRIVATE, disk_errors, writing
from isthmus.storage.journal import Journal
from isthmus.storage.sealed import DamagedError, seal, unseal

log = logging.getLogger(__name__)

ROLES = ("trunk", "root", "edges", "silos")
"""Folders of a run directory, which a role creates once its model and identity are valid."""
ADAPTER_KEYS = (
    *("model.bottom", "model.top", "seed", "federation.lora", "federation.between", "trunk.adapter"),
    *("lora.rank", "lora.alpha", "lora.rslora", "lora.targets", "lora.freeze_bottom"),
)
"""Keys of a recipe that fix which adapters a run has and how they start."""
LOCK_SECONDS = 15.0
"""Seconds to wait for a run directory that another run has locked."""
ROUND_FILE = re.compile(r"round-(\d{4,})\.pt")


class RunDirectory:
    """One run's files. ``isthmus run`` writes all of them; on separate machines each party has its own part of them.

    ::

        recipe.toml                       the recipe as it is run, with every key
        lock                              locked while a run is going on
        ROLE.lock                         locked while a role that was started by itself is going on
        certificates/PARTY/               ca.pem, cert.pem and key.pem, made by the local engine
        logs/ROLE.log                     output of each process; trunk.log is the trunk's and the root's
        trunk/run                         random name of the run, made with the first adapter
        trunk/metrics.jsonl               one line for each optimizer step: round, step, silos
        trunk/rounds/round-0003.pt        adapter and optimizers of the trunk after round 3; round 0 is the start
        trunk/kept/SILO/                  examples that a silo released once, as received
        trunk/answers/SILO/               its last answer about each of them, with ``boundary.differences``
        trunk/portions/                   files of the parts that silos keep, a folder for each cut
        trunk/left/round-0003.pt          adapters and moments that left when the cut moved after round 3
        ROLE/cut                          bottom and top of a role by itself, once its cut has moved
        root/metrics.jsonl                one line for each round: weights; staleness, shares, clip if any
        root/rounds/round-0003.pt         shared adapters after round 3; state of strategy, clip and control
        root/end-early                    the root was asked to end the federation
        root/ledger.jsonl, ledger.head    releases of the root, where it adds the noise of sums
        edges/NAME/metrics.jsonl          one line for each round: weights
        silos/NAME/metrics.jsonl          one line for each step, evaluation and fairness measurement
        silos/NAME/ledger.jsonl           one line for each release, in a chain of hashes
        silos/NAME/ledger.head            length of the chain, and its last hash
        silos/NAME/records/record-key     key of the records' names in the ledger
        silos/NAME/records/sensitivity.json   scale of the classes' noise
        silos/NAME/released/              examples released once, as sent; ``secret`` is the key of their numbers
        silos/NAME/released/answers/      the trunk's last answer about each of them
        silos/NAME/rounds/round-0003.pt   optimizer, guard, error feedback, fairness and control after round 3
        silos/NAME/shared/round-0003.pt   shared adapters after round 3, as received; the last two are kept
        silos/NAME/draft.safetensors      the distilled draft, after ``isthmus draft``
        baselines/alone/NAME/             metrics and rounds of what ``isthmus run --baseline alone`` trained
        baselines/pooled/                 the same of ``--baseline pooled``
        moving/, moving-ROLE/             new files of a cut that is being moved, which take the others' places
        attack.json                       results of ``isthmus attack``
        demo.json                         results of ``isthmus demo``

    Files are written atomically, for their owner alone; a journal's incomplete last line is dropped. Rounds are kept.
    Each file has a checksum, and each line of a journal: a run goes on from the last round that trunk and root can both
    read, and saves later ones anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDirectory:
        """A new run directory with this recipe. Replaces the recipe of a run in which no role has started.

        Raises:
            RunError: the directory already holds a run.
        """
        cls.require_free(path)
        run = cls(path.resolve())
        run._write(recipe)
        return run

    @classmethod
    def require_free(cls, path: Path) -> None:
        """Check that a run can be created at this path.

        Raises:
            RunError: the directory already holds a run.
        """
        if any((path.resolve() / role).exists() for role in ROLES):
            raise RunError(
                f"{path} already holds a run",
                remedy=f"continue it with 'isthmus run --resume {path}', or name another directory",
            )

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run directory at this path.

        Raises:
            RunError: there is none.
        """
        run = cls(path.resolve())
        if not run.recipe_path.exists():
            raise RunError(
                f"{path} is not a run directory: it has no recipe.toml",
                remedy="name a folder that 'isthmus run' wrote, or the --run-dir of a role such as 'isthmus silo'",
            )
        return run

    def record(self, recipe: Recipe) -> None:
        """Write the recipe of a role that runs by itself, so that the directory can be opened afterwards.

        Raises:
            RunError: the directory holds a run whose adapters have other shapes or another start.
        """
        if self.recipe_path.exists():
            before = self.recipe()
            if before == recipe:
                return
            other = [key for key in ADAPTER_KEYS if _value(before, key) != _value(recipe, key)]
            if before.widest != recipe.widest:
                other.append("the largest silo.bottom or silo.top")
            if other and any((self.path / role).exists() for role in ROLES):
                raise RunError(
                    f"{self.path} holds a run of another recipe: {', '.join(other)} differs",
                    remedy="name another directory with --run-dir",
                )
        self._write(recipe)

    def rewrite(self, recipe: Recipe) -> None:
        """Replace the run's recipe; the states must fit it."""
        self._write(recipe)

    def _write(self, recipe: Recipe) -> None:
        """Write the recipe. Certificates inside the directory get a relative path, so that it can be moved."""
        certificates = Path(recipe.wire.certificates)
        if certificates.is_relative_to(self.path):
            inside = {"certificates": str(certificates.relative_to(self.path))}
            recipe = recipe.model_copy(update={"wire": recipe.wire.model_copy(update=inside)})
        with writing(self.recipe_path) as temporary:
            temporary.write_text(with_checksum(recipe.toml()), encoding="utf-8")

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.toml"

    def recipe(self) -> Recipe:
        """The run's recipe."""
        return Recipe.read(self.recipe_path)

    def role(self, name: str) -> RoleDirectory:
        """The directory of ``trunk``, ``root`` or the silo of this name."""
        return RoleDirectory(self.path / name if name in ("trunk", "root") else self.path / "silos" / name)

    def edge(self, name: str) -> RoleDirectory:
        """The directory of the edge of this name."""
        return RoleDirectory(self.path / "edges" / name)

    def completed(self) -> int:
        """The last round of which both trunk and root have an undamaged state. Either may have later ones: the trunk
        after an interruption, both if the other's is damaged."""
        trunk, root = self.role("trunk"), self.role("root")
        number = min(trunk.last_round(), root.last_round())
        while number and (found := min(trunk.last_round(number), root.last_round(number))) < number:
            number = found
        return number

    @property
    def deployed(self) -> bool:
        """Whether a party ran here by itself, so that the other parties' folders are missing."""
        everyones = all((self.path / "certificates" / role).is_dir() for role in ("trunk", "root"))
        by_engine = everyones or (self.path / "logs").is_dir()
        return not by_engine and any((self.path / role).is_dir() for role in ROLES)

    @property
    def served_here(self) -> bool:
        """Whether both trunk and root have their folders here, so that a trunk process can serve the result."""
        return all(self.role(role).path.is_dir() for role in ("trunk", "root"))

    def silos(self) -> list[str]:
        """The silos whose folders are here, in the recipe's order."""
        return [silo.name for silo in self.recipe().silo if self.role(silo.name).path.is_dir()]

    @contextmanager
    def locked(self, *, shared: bool = False, seconds: float | None = None, role: str = "") -> Iterator[int]:
        """Lock the directory against other runs within the ``with`` block.

        Args:
            shared: lock it against runs, but not against others that use its result.
            seconds: longest time to wait for the lock; None: ``LOCK_SECONDS``.
            role: lock this role alone (a process that serves it by itself); empty: the directory.

        Yields:
            A file descriptor. Processes that inherit it share the lock, which ends with the last of them.

        Raises:
            RunError: another process still holds the lock after that time.
        """
        with disk_errors(self.path):
            place = self.path / (f"{role}.lock" if role else "lock")
            file = os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT, PRIVATE), "w")
        with file:
            end = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)
            while not _lock(file.fileno(), fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise RunError(
                        f"another process of {role} uses {self.path}"
                        if role
                        else f"another run is still going on in {self.path}"
                        if shared
                        else f"another run is still going on in {self.path}, or its result is in use",
                        remedy="wait until it ends, or stop its processes",
                    )
                time.sleep(0.1)
            yield file.fileno()


class RoundFiles:
    """A folder with one file for each of several rounds.

    Args:
        keep: number of last rounds whose files are kept; None: all.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        self._keep = keep
        self.lasting: Callable[[int], bool] = lambda number: False
        """Says whether a round's file stays, however many come after it."""
        self._good: set[int] = set()
        """Rounds whose files were written or verified here."""

    def save_round(self, number: int, state: dict[str, Any]) -> None:
        """Save the state after this round atomically."""
        import torch

        content = io.BytesIO()  # torch's own writer reports a full disk by various errors
        torch.save(state, content)
        with writing(self._file(number)) as temporary:
            temporary.write_bytes(seal(content.getbuffer()))
        self._good.add(number)
        if self._keep is not None:
            for old in filter(self._passes, sorted(self.rounds())[: -self._keep]):
                self._file(old).unlink(missing_ok=True)

    def remove_before(self, number: int, keep: int) -> None:
        """Remove the files of all rounds up to this one but round 0, lasting ones, and the last ``keep``."""
        for old in filter(self._passes, sorted(one for one in self.rounds() if 0 < one <= number)[:-keep]):
            self._file(old).unlink(missing_ok=True)
            self._good.discard(old)

    def _passes(self, number: int) -> bool:
        return not self.lasting(number)

    def remove_after(self, number: int) -> None:
        """Remove the files of all rounds after this one."""
        for later in [one for one in self.rounds() if one > number]:
            self._file(later).unlink(missing_ok=True)
            self._good.discard(later)

    def load_round(self, number: int) -> dict[str, Any]:
        """The saved state after this round.

        Raises:
            RunError: there is none, it cannot be read, or it is damaged.
        """
        import torch

        try:
            content = io.BytesIO(self._content(number))
            state: dict[str, Any] = torch.load(content, weights_only=True, map_location="cpu")
            return state
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            why = f": {error}" if isinstance(error, DamagedError) else ""
            raise RunError(
                f"no readable state of round {number} in {self.path.parent}: {self._file(number)}{why}",
                remedy="start the role or 'isthmus run --resume' again, which goes on from the last undamaged round; "
                "or restore the file from a backup, or start a new run",
            ) from error

    def digest(self, number: int) -> bytes:
        """SHA-256 of the saved state after this round, as it lies on the disk.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        try:
            return hashlib.sha256(self._file(number).read_bytes()).digest()
        except OSError as error:
            raise RunError(
                f"no readable state of round {number} in {self.path.parent}", remedy="start a new run"
            ) from error

    def last_round(self, until: int | None = None) -> int:
        """The last round with an undamaged state; 0 if there is none. A damaged one is passed over and logged.

        Args:
            until: the last round to look at; None: all.
        """
        damaged: list[str] = []
        for number in sorted(self.rounds(), reverse=True):
            if (until is None or number <= until) and self._undamaged(number, damaged):
                break
        else:
            number = 0
        if damaged:
            log.warning("%s; going on from round %d", "; ".join(damaged), number)
        return number

    def _undamaged(self, number: int, damaged: list[str]) -> bool:
        """Whether the round's file is as it was saved; if not, what is wrong is appended to ``damaged``."""
        if number not in self._good:
            try:
                self._content(number)
            except (OSError, DamagedError) as error:
                damaged.append(f"{self._file(number)} is passed over: {error}")
                return False
            self._good.add(number)
        return True

    def _content(self, number: int) -> memoryview:
        return unseal(self._file(number).read_bytes())

    def _file(self, number: int) -> Path:
        return self.path / f"round-{number:04d}.pt"

    def rounds(self) -> set[int]:
        """All rounds with a saved state, damaged or not."""
        names = self.path.iterdir() if self.path.is_dir() else ()
        return {int(match[1]) for name in names if (match := ROUND_FILE.fullmatch(name.name))}


class RoleDirectory:
    """The directory of one role within a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rounds = RoundFiles(path / "rounds")
        self._early_end = path / "end-early"
        self.keep: int | None = None
        """Number of last rounds that are kept besides round 0, the start; None: all."""
        self._saved = False
        """Whether this process has saved a round."""
        self.until: int | None = None
        """Later rounds are passed over when the role starts, as another role cannot go on from them; None: none are."""
        self.shared = RoundFiles(path / "shared", keep=2)
        """A silo's: the shared adapters of the last rounds, as ``shared``, and the name of the trunk's run, ``run``."""

    @property
    def ended_early(self) -> bool:
        """A root's: whether its federation is to end after the last finished round (see ``end_early``)."""
        return self._early_end.exists()

    def end_early(self) -> None:
        """Ask the root that runs here to end its federation after the last finished round."""
        with disk_errors(self.path):
            self._early_end.touch(mode=PRIVATE)

    def go_on(self) -> None:
        """Take that back."""
        self._early_end.unlink(missing_ok=True)

    def keep_as(self, train: TrainSection) -> None:
        """Keep as many rounds as the recipe says, and those among which it chooses the best one."""
        self.keep = train.keep_rounds
        self._rounds.lasting = self.shared.lasting = train.keeps

    def journal(self, name: str) -> Journal:
        """The journal ``name.jsonl``, created if it does not exist."""
        return Journal(self.path / f"{name}.jsonl")

    def save_round(self, number: int, state: dict[str, Any]) -> None:
        """Save the state after this round atomically. Files of earlier rounds are kept, or the last ``keep`` of them.
        Later ones that the role passed over when it started are removed with its first round: they do not follow from
        it. Rounds without waiting may be saved in another order afterwards."""
        if not self._saved:
            self._rounds.remove_after(number)
        self._saved = True
        self._rounds.save_round(number, state)
        if self.keep is not None:
            self._rounds.remove_before(number, self.keep)
        self.until = None

    def load_round(self, number: int) -> dict[str, Any]:
        """The saved state after this round (see ``RoundFiles``)."""
        return self._rounds.load_round(number)

    def digest(self, number: int) -> bytes:
        """See ``RoundFiles.digest``."""
        return self._rounds.digest(number)

    def last_round(self, until: int | None = None) -> int:
        """The last round with an undamaged state, up to ``until`` (see ``RoundFiles``)."""
        return self._rounds.last_round(self.until if until is None else until)

    def rounds(self) -> set[int]:
        """All rounds with a saved state, damaged or not."""
        return self._rounds.rounds()


def _value(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
