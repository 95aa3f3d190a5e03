"""A trunk's host unplugged for ten minutes, a silo off for a day: whether a federation goes on without a human.

``make bench-outages``. Federations of real processes in network namespaces of their own: trunk with root, whose
authority two silos joined by invites. A day is emulated: the wall clocks of all processes are moved by ``libfaketime``,
their monotonic clocks are not. Needs root, ``ip``, ``iptables`` and ``libfaketime``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from cryptography import x509

from benchmarks.common.network import LEADER, Network
from benchmarks.common.results import Results
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.recipe.waits import Waits
from isthmus.storage.files import writing
from isthmus.storage.journal import read_journal
from tests.integration.processes import rows_of, state, steps_of, write_federation, write_rows

SILOS = ("north", "south")
ROUNDS, STEPS = 4, 20
AT = (2, STEPS // 2)
"""Round and step at which what is to happen happens."""
OUTAGE, PATIENCE = 600.0, 300.0
"""Seconds for which a host is unplugged; seconds after which a federation is taken to hang."""
BARRIER = 5.0
"""Seconds after which a silo has surely reached the barrier of a step."""
DAY, HOURS = 86_400, 24
AGE = 59.5 * DAY
"""Age of the certificates, which are valid for 90 days, when training begins: within a day they are to be renewed."""
SHIPPED = Waits.of(Recipe.model_fields["patience"].default)
SHORT = 6.0
"""Seconds of patience, where a day is emulated in 24."""
FAKETIME = "/usr/$LIB/faketime/libfaketimeMT.so.1"


class Clock:
    """The wall clock of a federation's processes, which can be moved while they run."""

    def __init__(self, file: Path) -> None:
        self._file, self._seconds = file, 0.0

    def move(self, seconds: float) -> None:
        self._seconds += seconds
        with writing(self._file) as temporary:
            temporary.write_text(f"+{self._seconds:.0f}\n")

    def environment(self) -> dict[str, str]:
        """Of a process that shall see this clock; empty if it is never moved."""
        if not self._file.exists():
            return {}
        monotonic = {"DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        file = {
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "NO_FAKE_STAT": "1",
            "FAKETIME_DISABLE_SHM": "1",
        }
        return {"LD_PRELOAD": FAKETIME} | monotonic | file


class Federation:
    """Trunk with root, and two silos that joined it, from joining to the end of training.

    Args:
        days: whether the clock of its processes will be moved.
        patience: the trunk's and the root's, in seconds; None: the recipe's default.
    """

    def __init__(self, folder: Path, name: str, *, days: bool = False, patience: float | None = None) -> None:
        self.folder, self.name = folder / name, name
        self.network = Network(SILOS, f"isthmus-{name}")
        self._leader = self.home(LEADER)
        self.clock, self.days = Clock(self.folder / "clock"), days
        if days:
            self.clock.move(0.0)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        other = {} if patience is None else {"patience": patience}
        write_federation(
            self._leader,
            train={"rounds": ROUNDS, "steps": STEPS, "evaluate": False},
            wire={"deadline": SHIPPED.reach},
            trunk={"address": self.network.address, **other},
            root={"address": self.network.address, **other},
        )

    def live(self, life: Callable[[Federation], float]) -> float:
        """Join, train with what happens in this life, and end."""
        try:
            with self.network:
                self._join()
                self.joined = self.certificates()
                seconds = life(self)
                self.until(lambda: all(self.running[silo].poll() == 0 for silo in SILOS), "the end of training")
                return seconds
        finally:
            for process in self.running.values():
                process.kill()
                process.wait()

    def _join(self) -> None:
        self.type(LEADER, "authority", "init", "recipe.toml")
        self.start(LEADER)
        for silo in SILOS:
            rows = write_rows(self.home(silo) / "own.jsonl", rows_of(silo))
            (invite,) = self.type(LEADER, "invite", silo).split()
            self.type(silo, "join", invite, "--train", str(rows), "--folder", "own", "--no-check")

    def home(self, party: str) -> Path:
        place = self.folder / party
        place.mkdir(parents=True, exist_ok=True)
        return place

    def type(self, party: str, *words: str) -> str:
        """Run a command to its end; returns what it prints."""
        done = subprocess.run(self._isthmus(party, *words), **self._where(party), stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    def start(self, party: str) -> None:
        """Start a party's role; the same command each time."""
        words = {LEADER: ("trunk", "recipe.toml", "--with-root", "--authority", "authority", "--run-dir", "run")}
        command = words.get(party, ("silo", "own/recipe.toml", party, "--run-dir", "run"))
        with (self.home(party) / "log").open("ab") as log:
            options = {**self._where(party), "stdout": log, "stderr": log}
            self.running[party] = subprocess.Popen(self._isthmus(party, *command), **options)

    def begin(self) -> None:
        """Start the silos, and wait until they are in the middle of a round."""
        for silo in SILOS:
            self.start(silo)
        self.until(lambda: all(max(self.steps(silo), default=(0, 0)) >= AT for silo in SILOS), f"step {AT}")

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self.running.items() if process.poll()]
            if ended or time.monotonic() > end:
                logs = "".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*/log"))
                raise RuntimeError(f"{self.name}: {', '.join(ended) or 'nobody'} ended before {what}\n{logs}")
            time.sleep(0.05)

    def steps(self, silo: str) -> list[tuple[int, int]]:
        return steps_of(self.home(silo) / "run", silo)

    def next_step(self, since: float) -> float:
        """Seconds since then, a monotonic time, until every silo has taken a step more than now."""
        before = {silo: len(self.steps(silo)) for silo in SILOS}
        self.until(lambda: all(len(self.steps(silo)) > count for silo, count in before.items()), "the next step")
        return time.monotonic() - since

    def whole_rounds(self) -> int:
        """Rounds to which every silo contributed."""
        lines = read_journal(self._leader / "run" / "root" / "metrics.jsonl")
        return len({line["round"] for line in lines if sorted(line.get("weights", ())) == sorted(SILOS)})

    def steps_without_a_silo(self) -> int:
        """Optimizer steps of the trunk to which not every silo contributed."""
        lines = read_journal(self._leader / "run" / "trunk" / "metrics.jsonl")
        return sum(sorted(line["silos"]) != sorted(SILOS) for line in lines if line["round"] <= ROUNDS)

    def releases(self) -> dict[str, list[object]]:
        """What crossed, by silo, as its ledger says."""
        ledgers = {silo: self.home(silo) / "run" / "silos" / silo / "ledger.jsonl" for silo in SILOS}
        return {silo: list(read_ledger(file).releases()) for silo, file in ledgers.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Adapters and moments of optimizers of all parties after the last round."""
        runs = {"trunk": LEADER, "root": LEADER} | {silo: silo for silo in SILOS}
        found = [state(self.home(party) / "run", role, ROUNDS) for role, party in runs.items()]
        return {key: tensor for part in found for key, tensor in part.items() if not key.endswith("/step")}

    def certificates(self) -> dict[str, int]:
        """By party, the serial number of its certificate."""
        folders = {LEADER: self._leader / "certificates" / "trunk"}
        folders |= {silo: self.home(silo) / "own" / "certificates" / silo for silo in SILOS}
        read = {name: (folder / "cert.pem").read_bytes() for name, folder in folders.items()}
        return {name: x509.load_pem_x509_certificate(data).serial_number for name, data in read.items()}

    def _isthmus(self, party: str, *words: str) -> list[str]:
        return self.network.inside(party, sys.executable, "-m", "isthmus", *words)

    def _where(self, party: str) -> dict:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | self.clock.environment()
        return {"cwd": self.home(party), "env": environment, "stdin": subprocess.DEVNULL}


def undisturbed(federation: Federation) -> float:
    federation.begin()
    return 0.0


def unplugged(federation: Federation, seconds: float) -> float:
    """The leader's host is unplugged while both silos are at work in a step."""
    federation.begin()
    return _without_network(federation, seconds)


def unplugged_at_barrier(federation: Federation, seconds: float) -> float:
    """The leader's host is unplugged while one silo waits at the trunk for the other."""
    federation.begin()
    south = federation.running["south"]
    south.send_signal(signal.SIGSTOP)
    time.sleep(BARRIER)
    return _without_network(federation, seconds, lambda: south.send_signal(signal.SIGCONT))


def _without_network(federation: Federation, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> float:
    for silo in SILOS:
        federation.network.pull(silo)
    meanwhile()
    time.sleep(seconds)
    for silo in SILOS:
        federation.network.plug(silo)
    return federation.next_step(time.monotonic())


def killed(federation: Federation) -> float:
    """A silo's host loses power, and has it again a day later."""
    federation.clock.move(AGE)
    federation.begin()
    federation.running["north"].kill()
    federation.running.pop("north").wait()
    _pass_a_day(federation.clock)
    federation.start("north")
    return federation.next_step(time.monotonic())


def suspended(federation: Federation) -> float:
    """A silo's host sleeps for a day."""
    federation.clock.move(AGE)
    federation.begin()
    federation.network.pull("north")
    federation.running["north"].send_signal(signal.SIGSTOP)
    _pass_a_day(federation.clock)
    federation.network.plug("north")
    federation.running["north"].send_signal(signal.SIGCONT)
    return federation.next_step(time.monotonic())


def _pass_a_day(clock: Clock) -> None:
    """An hour a second."""
    for _ in range(HOURS):
        clock.move(DAY / HOURS)
        time.sleep(1.0)


def report(results: Results, what: str, federation: Federation, other: Federation, seconds: float) -> None:
    """The rows of one outage, beside a federation that had none."""
    results.add(f"{what}: from then to a training step of both silos", seconds, "s")
    results.add(f"{what}: rounds without a silo", ROUNDS - federation.whole_rounds(), "rounds", at_most=0)
    results.add(f"{what}: training steps without a silo", federation.steps_without_a_silo(), "steps")
    taken = [federation.steps(silo) for silo in SILOS]
    again = sum(len(steps) - len(set(steps)) for steps in taken)
    results.add(f"{what}: training steps taken again", again, "steps")
    found, expected = federation.tensors(), other.tensors()
    apart = max(float((found[key].double() - expected[key].double()).abs().max()) for key in expected)
    results.add(f"{what}: largest difference from an undisturbed run's adapters and moments", apart, "", at_most=0)
    ours, theirs = federation.releases(), other.releases()
    more = sum(len(ours[silo]) - len(theirs[silo]) for silo in SILOS)
    parties = len(federation.joined)
    if federation.days:  # what was trained in the round that began again crossed, and crosses again
        results.add(f"{what}: releases charged for steps taken again", more, "releases")
        renewed = parties - len(federation.joined.items() & federation.certificates().items())
        results.add(f"{what}: certificates renewed, of {parties}", renewed, "parties", at_least=parties)
    else:
        results.add(f"{what}: releases charged beyond an undisturbed run's", more, "releases", at_most=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outage", type=float, default=OUTAGE, help="seconds for which a host is unplugged")
    seconds = parser.parse_args().outage
    results = Results("outages", "make bench-outages" + ("" if seconds == OUTAGE else f' ARGS="--outage {seconds:g}"'))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as threads:
        folder = Path(temporary)
        quiet = Federation(folder, "quiet")
        unplug = f"trunk's host unplugged for {seconds / 60:g} minutes"
        at_work, at_barrier = partial(unplugged, seconds=seconds), partial(unplugged_at_barrier, seconds=seconds)
        outages: dict[str, tuple[Federation, Callable[[Federation], float]]] = {
            unplug: (Federation(folder, "plug"), at_work),
            f"{unplug}, a silo waiting": (Federation(folder, "wait"), at_barrier),
            f"{unplug}, a silo waiting, more patience": (
                Federation(folder, "patient", patience=2 * seconds),
                at_barrier,
            ),
            "a silo's host off for a day": (Federation(folder, "off", days=True, patience=SHORT), killed),
            "a silo's host asleep for a day": (Federation(folder, "asleep", days=True, patience=SHORT), suspended),
        }
        without = threads.submit(quiet.live, undisturbed)
        lived = {what: threads.submit(federation.live, life) for what, (federation, life) in outages.items()}
        without.result()
        for what, ended in lived.items():
            report(results, what, outages[what][0], quiet, ended.result())
    print(f"written: {results.write()}")


if __name__ == "__main__":
    main()
