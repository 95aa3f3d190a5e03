"""What is wrong with a party before it runs: recipe, certificate, model, rows, disk, memory, port and servers."""

from __future__ import annotations

import datetime
import errno
import math
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from cryptography import x509

from isthmus.data.summary import SetSummary, SiloSummary
from isthmus.engines.data_check import summarize_data
from isthmus.engines.dry_run import TRAINS, DryRun, context_of, dry_run
from isthmus.engines.fresh import in_fresh_process
from isthmus.engines.memory import free_memory
from isthmus.engines.reachability import ConnectionProblem, Finding, Reached, reach, servers_of, shown_certificate
from isthmus.errors import IsthmusError, RecipeError
from isthmus.joining.join import SPARE
from isthmus.joining.keeper import CONTACT, RENEWAL
from isthmus.model import adapters
from isthmus.model.agreement import hello_of
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, empty_part
from isthmus.model.device import find_device
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.silo.join import greeting
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import CERTIFICATE, Identity, Role
from isthmus.wire.invite import fingerprint, key_of

TRAINING_STATES = 3
"""Numbers that are kept for each one that trains: itself, and an optimizer's two averages."""
RUNTIME = 4e8
"""Bytes that Python, torch and what it computes with take beside a model's weights."""
ROOMY = 2.0
"""Times what is needed that should be free."""
ROW_STEP = 32
"""Lengths of a dry run's rows are multiples of it: of the silo's rows it tells no more."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Diagnosis:
    """What all checks of a party found."""

    party: str
    """Empty: the recipe cannot be read, or does not say who it is for."""
    role: str
    findings: tuple[Finding, ...]
    dry_run: DryRun | None = None
    round_seconds: float | None = None
    """About what a silo's round takes, without waiting for other silos; None: not measured."""
    run_seconds: float | None = None

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(one.state == "failed" for one in self.findings)


def diagnose(
    path: Path,
    name: str | None = None,
    *,
    run_dir: Path | None = None,
    dry: bool = True,
    notify: Callable[[str], None] = lambda message: None,
) -> Diagnosis:
    """Check one party on its own machine. Nothing of the federation changes.

    Args:
        path: the recipe's file.
        name: a silo or an edge of the recipe, ``trunk`` or ``root``; None: the one party whose certificate is here.
        run_dir: where the party writes; None: at the recipe's folder.
        dry: also take ``dry_run.DRY_STEPS`` steps, if the party is a silo.
        notify: called with messages about the progress.
    """
    try:
        recipe = Recipe.read(path)
        party = name or _only_party(recipe)
        role = recipe.tree.role(party)
    except IsthmusError as error:
        return Diagnosis(name or "", "", (_failed("recipe", error),))
    return Doctor(path, recipe, party, role, run_dir or path.resolve().parent, notify).examine(dry)


class Doctor:
    """Examines one party.

    Args:
        path: the recipe's file.
        folder: where the party writes.
    """

    def __init__(
        self, path: Path, recipe: Recipe, name: str, role: Role, folder: Path, notify: Callable[[str], None]
    ) -> None:
        self._path, self._recipe, self._name, self._role = path, recipe, name, role
        self._folder, self._notify = folder, notify
        self._findings: list[Finding] = []
        self._rows: SetSummary | None = None
        """The silo's training rows."""

    def examine(self, dry: bool) -> Diagnosis:
        """All checks, one after another."""
        cut = f"cut ({self._recipe.model.bottom}, {self._recipe.model.top})"
        count = len(self._recipe.silo)
        self._say("recipe", f"{self._path}: {count} silo{'' if count == 1 else 's'}, {cut}")
        identity = self._tried("certificate", self._certificate)
        hello = self._tried("model", self._model)
        if hello is not None:
            self._tried("device", self._device)
            self._tried("disk", self._disk)
            self._tried("memory", self._memory)
        if self._role == "silo":
            self._tried("rows", self._data)
        elif identity is not None:
            self._tried("port", lambda: self._port(identity))
        reached = [] if identity is None else self._servers(hello)
        if dry and self._role == "silo" and hello is not None:
            return self._dry_run(reached)
        return self._diagnosis()

    def _certificate(self) -> Identity:
        place = Path(self._recipe.wire.certificates)
        identity = Identity.load(place, self._name, self._role)
        read = x509.load_pem_x509_certificates(identity.certificate)[0]
        left = read.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        life = read.not_valid_after_utc - read.not_valid_before_utc
        key = key_of(identity.authority)
        signer = f"authority {fingerprint(key)}" if key else "an authority of an organization's own"
        renewed = (place / self._name / CONTACT).exists()
        words = f"of {self._name}, {self._role}; {_days(left.total_seconds())} left; {signer}"
        if left < RENEWAL * life and not renewed:
            self._warn("certificate", f"{words}; nothing renews it", "ask who leads the federation for a new one")
        else:
            self._say("certificate", words)
        self._tried("names", lambda: self._own_names(read))
        return identity

    def _own_names(self, certificate: x509.Certificate) -> None:
        """A server's certificate must hold the names that others look for."""
        if self._role == "silo":
            return
        both = self._role == "trunk" and self._recipe.trunk.address == self._recipe.root.address
        wanted = {self._name, ROOT} if both else {self._name}
        try:
            named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found = set(named.get_values_for_type(x509.DNSName))
        except x509.ExtensionNotFound:
            found = set()
        if lacking := sorted(wanted - found):
            remedy = f"have one made with the alternative name{'s' * (len(wanted) > 1)} {' and '.join(sorted(wanted))}"
            self._fail("names", f"the certificate is not for the name {' and '.join(lacking)}", remedy)
        else:
            self._say("names", f"the certificate is for {' and '.join(sorted(wanted))}")

    def _model(self) -> pb.Hello:
        own = self._recipe.of_silo(self._name, ranked=False) if self._role == "silo" else self._recipe
        checkpoint = Checkpoint(own.model.path)
        if self._role not in ("silo", "trunk"):
            self._say("model", f"{own.model.path}: its configuration")
            return hello_of(own, checkpoint)
        hello = greeting(checkpoint, own)
        self._say("model", f"{own.model.path}: fingerprint {hello.fingerprint[:16]}")
        return hello

    def _device(self) -> None:
        section = self._recipe.trunk if self._role == "trunk" else None
        if self._role == "silo":
            find_device(self._recipe.party(self._name).device)
        elif section is not None:
            find_device(section.device)

    def _data(self) -> None:
        if not self._recipe.train.rounds and not self._recipe.party(self._name).train:
            self._say("rows", "none are needed, nothing trains")
            return
        summary = summarize_data(self._recipe, [self._name], 0)
        own: SiloSummary = summary.silos[0]
        self._rows = own.sets["train"]
        if own.error is not None:
            message, _, remedy = own.error.partition("\n  remedy: ")
            self._fail("rows", message, remedy)
            return
        counts = ", ".join(f"{one.rows:,} {kind}" for kind, one in own.sets.items())
        longest = self._rows.lengths.most if self._rows.lengths else 0
        self._say("rows", f"{counts}; the longest has {longest} tokens")
        for warning in own.warnings:
            self._warn("rows", warning, f"isthmus data {self._path} --silo {self._name} shows them")

    def _disk(self) -> None:
        place = next(one for one in (self._folder, *self._folder.resolve().parents) if one.exists())
        needed, free = disk_needed(self._recipe, self._name, self._role) + SPARE, shutil.disk_usage(place).free
        words = f"{_size(free)} free at {place}; about {_size(needed)} needed"
        remedy = "free some space, write elsewhere with --run-dir, or lower train.keep_rounds for all parties"
        self._compare("disk", words, free, needed, remedy)

    def _memory(self) -> None:
        needed, free = memory_needed(self._recipe, self._name, self._role), self._free()
        words = f"{_size(free)} free; about {_size(needed)} needed for weights and runtime"
        self._compare("memory", words, free, needed, self._memory_remedy())

    def _free(self) -> int:
        """Bytes that are free: of the role's CUDA device, or of the machine."""
        named = {"silo": lambda: self._recipe.party(self._name).device, "trunk": lambda: self._recipe.trunk.device}
        device = find_device(named[self._role]()) if self._role in named else torch.device("cpu")
        return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()

    def _memory_remedy(self) -> str:
        if self._role == "silo":
            return "free memory; or fewer blocks here (isthmus cut), a smaller train.batch or train.max_tokens"
        return "free memory; or a machine with more; for the trunk also model.dtype or trunk.dtype of 16 bits"

    def _compare(self, check: str, words: str, free: float, needed: float, remedy: str) -> None:
        if free < needed:
            self._fail(check, words, remedy)
        elif free < ROOMY * needed:
            self._warn(check, words, remedy)
        else:
            self._say(check, words)

    def _port(self, identity: Identity) -> None:
        address = own_address(self._recipe, self._name, self._role)
        try:
            _bind(address)
        except OSError as error:
            self._findings.append(_port_finding(address, identity, self._name, error))
        else:
            self._say("port", f"{address} is free")

    def _servers(self, hello: pb.Hello | None) -> list[Reached]:
        found = []
        for place in servers_of(self._recipe, self._name, self._role):
            self._notify(f"reaching {place.name} at {place.address}")
            found.append(reach(self._recipe, place, self._name, self._role, hello))
            self._findings += found[-1].findings
        return found

    def _dry_run(self, reached: list[Reached]) -> Diagnosis:
        alone, found = _why_alone(reached), None
        self._notify("taking ten steps that train nothing")
        free = self._free()
        try:
            for one in in_fresh_process(dry_run, self._recipe, self._name, self._row_length(), alone):
                found = one
        except IsthmusError as error:
            self._findings.append(_failed("dry run", error))
            return self._diagnosis(found)
        if found is None:
            self._fail("dry run", "its process was ended for want of memory", self._memory_remedy())
            return self._diagnosis()
        self._report_dry_run(found, free)
        return self._diagnosis(found)

    def _report_dry_run(self, found: DryRun, free: int) -> None:
        waited = "" if found.waited is None else f" ({found.waited:.2g} s for the trunk's forward)"
        crossing = f"{_size(found.up)}, receives {_size(found.down)}"
        words = f"{found.steps} steps of {found.seconds:.2g} s{waited}; a training step sends {crossing}"
        if found.alone:
            self._warn("dry run", f"{words}; without the trunk: {found.alone}", "run the doctor again later")
        else:
            self._say("dry run", words)
        memory = f"{_size(found.memory)} at most in a step with the longest rows; {_size(free)} were free"
        self._compare("peak memory", memory, free, found.memory, self._memory_remedy())
        if found.frame > (limit := self._recipe.wire.max_frame_bytes):
            words = f"a step with the longest rows makes frames of {_size(found.frame)}; {_size(limit)} are allowed"
            self._fail("frames", words, "raise wire.max_frame_bytes for all parties, or lower train.batch")

    def _row_length(self) -> int:
        """Tokens of a dry run's rows: about the longest twentieth of the silo's, or as many as rows may have."""
        longest = min(self._recipe.train.max_tokens, context_of(self._recipe))
        if self._rows is None or self._rows.lengths is None:
            return longest
        return min(longest, ROW_STEP * math.ceil(self._rows.lengths.p95 / ROW_STEP))

    def _diagnosis(self, found: DryRun | None = None) -> Diagnosis:
        made = Diagnosis(self._name, self._role, tuple(self._findings), found)
        if found is None or found.waited is None or (self._recipe.train.epochs is not None and self._rows is None):
            return made
        plan = self._recipe.round_steps(self._name, 1, self._rows.rows if self._rows else 0)
        rounds, step = self._recipe.train.rounds, found.step_seconds
        per_round = plan.total / rounds if rounds else 0
        return Diagnosis(
            self._name, self._role, tuple(self._findings), found, per_round * step, plan.total * step if rounds else 0.0
        )

    def _tried(self, check: str, examine: Callable[[], _T]) -> _T | None:
        try:
            return examine()
        except IsthmusError as error:
            self._findings.append(_failed(check, error))
        except (OSError, ValueError) as error:
            self._fail(check, f"{type(error).__name__}: {error}", "check the files that the recipe names")
        return None

    def _say(self, check: str, words: str) -> None:
        self._findings.append(Finding(check, "ok", words))

    def _warn(self, check: str, words: str, remedy: str) -> None:
        self._findings.append(Finding(check, "warning", words, remedy))

    def _fail(self, check: str, words: str, remedy: str) -> None:
        self._findings.append(Finding(check, "failed", words, remedy))


def own_address(recipe: Recipe, name: str, role: Role) -> str:
    """The address at which a server listens by the recipe."""
    return recipe.trunk.address if role == "trunk" else recipe.tree.node(name).address


def memory_needed(recipe: Recipe, name: str, role: Role) -> float:
    """About the bytes of memory that a role takes at rest: its weights, and the runtime.

    Args:
        name: the party's.
    """
    if role in ("root", "edge"):
        return RUNTIME + TRAINING_STATES * _shared_bytes(recipe) * (1 + len(recipe.tree.node(name).children))
    return RUNTIME + _weights(recipe, name, role)


def disk_needed(recipe: Recipe, name: str, role: Role) -> float:
    """About the bytes of disk that a role writes: the states of kept rounds, kept examples, parts of the model."""
    train = recipe.train
    rounds = train.keep_rounds + 1 + (10 if train.evaluate == "best" else 0) if train.rounds else 1
    if role == "edge":
        return 0.0
    if role == "root":
        return float(TRAINING_STATES * rounds * _shared_bytes(recipe))
    if role == "silo":
        return float(TRAINING_STATES * rounds * _shared_bytes(recipe))
    own = TRAINING_STATES * rounds * _trained_bytes(recipe)
    copies = len(recipe.silo) if recipe.trunk.adapter == "replica" else 1
    kept = recipe.trunk.kept_bytes * (recipe.boundary.release_once + recipe.boundary.differences)
    portions = {recipe.deepest(silo.name): silo.name for silo in recipe.silo}.values()
    return float(copies * own + kept + sum(_weights(recipe, silo, "silo") for silo in portions))


def _weights(recipe: Recipe, name: str, role: Role) -> int:
    """Bytes of the weights that a silo or the trunk loads."""
    config = Checkpoint(recipe.model.path).config
    if role == "trunk":
        dtype, cut = recipe.trunk.dtype or recipe.model.dtype, Cut(recipe.model.bottom, recipe.model.top)
        parts = [empty_part(config, cut, "trunk")]
    else:
        dtype, cut = recipe.model.dtype, Cut(*recipe.deepest(name))
        parts = [empty_part(config, cut, "bottom"), empty_part(config, cut, "top")]
    size: int = getattr(torch, dtype).itemsize * sum(one.numel() for part in parts for one in part.model.parameters())
    return size


def _shared_bytes(recipe: Recipe) -> int:
    """Bytes of the adapters that silos share, in 32 bits."""
    shapes = adapters.shared_shapes(adapters.empty_ends(Checkpoint(recipe.model.path).config, recipe))
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def _trained_bytes(recipe: Recipe) -> int:
    """Bytes of the trunk's adapter, in 32 bits."""
    part = empty_part(Checkpoint(recipe.model.path).config, Cut(recipe.model.bottom, recipe.model.top), "trunk")
    adapters.add_trained_layers(part, recipe)
    return 4 * sum(one.numel() for one in adapters.trainable(part).values())


def _only_party(recipe: Recipe) -> str:
    """The one party of the recipe whose certificate is here.

    Raises:
        RecipeError: there is none, or more than one.
    """
    folder = Path(recipe.wire.certificates)
    known = ("trunk", ROOT, *recipe.tree.parties)
    here = [name for name in known if (folder / name / CERTIFICATE).exists()]
    if len(here) != 1:
        found = f"those of {', '.join(here)} are" if here else "none is"
        raise RecipeError(
            f"no party is named, and of its certificates {found} in {folder}",
            remedy=f"name the party: isthmus doctor RECIPE NAME, one of {', '.join(here or known)}",
        )
    return here[0]


def _why_alone(reached: list[Reached]) -> str:
    """Why a dry run leaves the trunk out; empty: it need not."""
    pong = reached[0].pong if reached else None
    if pong is None:
        return "it is not reached, or not alike"
    return TRAINS if pong.welcome.training else ""


def _bind(address: str) -> None:
    """Raise ``OSError`` unless a server can listen at this address now."""
    host, _, port = address.rpartition(":")
    for family, *_, where in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
        socket.create_server(where[:2], family=family).close()


def _port_finding(address: str, identity: Identity, name: str, error: OSError) -> Finding:
    """What it means that a server cannot listen at its address."""
    host, _, port = address.rpartition(":")
    if isinstance(error, socket.gaierror):
        return Finding("port", "failed", f"the name {host} is not known here", "correct the address in the recipe")
    if error.errno == errno.EADDRINUSE:
        try:
            shown_certificate(address, identity.authority, name)
        except ConnectionProblem:
            words = f"{address} is taken by another program"
            return Finding("port", "failed", words, "end that program, or set another port in the recipe")
        return Finding("port", "ok", f"{name} runs at {address}")
    if error.errno == errno.EADDRNOTAVAIL:
        words = f"{address} is not an address of this machine, as behind a router"
        return Finding("port", "warning", words, f"start the server with --address 0.0.0.0:{port}")
    words = f"this user cannot listen at {address} ({error.strerror})"
    return Finding("port", "failed", words, "use a port from 1024 on, or give the right to use this one")


def _failed(check: str, error: IsthmusError) -> Finding:
    return Finding(check, "failed", error.message, error.remedy)


def _size(size: float) -> str:
    for unit, letters in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {letters}"
    return f"{size / 1e3:,.1f} kB"


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:.0f} days" if days >= 2 else f"{24 * days:.1f} hours"
