"""From a wheel to a chat window, as three people do it: the commands of the README, typed, in network namespaces.

Who leads has a model and an address; two silos have a CSV file each, and a namespace of its own from which one TCP
port of the leader can be reached. Needs root, ``ip`` and ``iptables``. ``make bench-afternoon``.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common.network import Network
from benchmarks.common.results import Results
from isthmus.demo.assets import hutto, smollm2

ROOT = Path(__file__).parents[2]
CACHE = Path("build/demo").resolve()
SILOS = ("north", "south")
GATEWAY = 8000
COMMANDS, MINUTES = 12, 15.0
ROWS, HELD_OUT = 48, 16


class People:
    """Who types commands: where, and how many."""

    def __init__(self, folder: Path, python: Path, network: Network) -> None:
        self.folder, self.typed, self._network = folder, list[str](), network
        self._path = f"{python.parent}:{os.environ['PATH']}"
        self._running = ExitStack()

    def home(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        return place

    def type(self, name: str, command: str) -> str:
        """Type a command and wait for its end; returns what it prints."""
        self._note(name, command)
        done = subprocess.run(self._inside(name, command), **self._where(name), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {command}\n{done.stdout}{done.stderr}")
        print(done.stdout, end="", flush=True)
        return done.stdout

    def leave_running(self, name: str, command: str) -> subprocess.Popen[str]:
        """Type a command that goes on in a terminal of its own."""
        self._note(name, command)
        log = (self.home(name) / f"terminal-{len(self.typed)}.log").open("w")
        process = subprocess.Popen(self._inside(name, command), **self._where(name), stdout=log, stderr=log, text=True)
        self._running.callback(process.wait)
        self._running.callback(process.terminate)
        return process

    def end(self) -> None:
        self._running.close()

    def _note(self, name: str, command: str) -> None:
        self.typed.append(f"{name}$ {command}")
        print(self.typed[-1][:160], flush=True)

    def _inside(self, name: str, command: str) -> list[str]:
        return self._network.inside(name, "bash", "-c", f"exec {command}")

    def _where(self, name: str) -> dict:
        home = self.home(name)
        environment = {"HOME": str(home), "PATH": self._path, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        kept = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or "proxy" in key.lower()}
        return {"cwd": home, "env": environment | kept}


def prepare(people: People) -> None:
    """What each has before: a model folder; a CSV file."""
    shutil.copytree(smollm2(CACHE), people.home("leader") / "model")
    files = hutto(CACHE, rows=ROWS, held_out=HELD_OUT, seed=1)
    for name, source in zip(SILOS, sorted(files), strict=False):
        for kind in ("train", "held_out"):
            rows = [json.loads(line) for line in Path(getattr(files[source], kind)).read_text().splitlines()]
            with (people.home(name) / f"{kind}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def wheel(folder: Path) -> Path:
    """The package, built from a copy of the sources."""
    copy = folder / "copy"
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = [
        "-m",
        "pip",
        "--quiet",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(copy),
    ]
    subprocess.run([sys.executable, *build], check=True)
    return next(folder.glob("*.whl"))


def walk(people: People, package: Path, address: str) -> str:
    """The commands; returns what the model answered in the chat window's place."""
    for name in ("leader", *SILOS):  # each on a machine of its own: here they share what the first one installs
        people.typed.append(f"{name}$ pip install '{package.name}[gateway]' torch==2.13.0")
    python = str(people.folder / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{package}[gateway]", "torch==2.13.0"], check=True)
    asked = """--prompt '{text}\\nThis is' --answer ' {label}'"""
    silos = " ".join(f"--silo {name}" for name in SILOS)
    people.type("leader", f"isthmus init --model model {silos} {asked} --address {address}")
    people.type("leader", "isthmus authority init recipe.toml")
    people.leave_running("leader", "isthmus trunk recipe.toml --with-root --authority authority")
    invites = people.type("leader", f"isthmus invite {' '.join(SILOS)}").split()
    rows = "--train train.csv --held-out held_out.csv"
    training = [
        people.leave_running(name, f"isthmus join {invite} {rows} --folder own --run")
        for name, invite in zip(SILOS, invites, strict=True)
    ]
    for process in training:
        if process.wait():
            logs = "".join(path.read_text()[-2000:] for path in people.folder.glob("*/terminal-*.log"))
            raise RuntimeError(f"a silo ended with {process.returncode}: {logs}")
    people.leave_running("north", f"isthmus gateway own/run --port {GATEWAY}")
    return chat(people)


def chat(people: People) -> str:
    """A question by curl from the silo's own machine, as a chat window asks it."""
    url = f"http://127.0.0.1:{GATEWAY}/v1/chat/completions"
    asked = {"model": "run", "max_tokens": 12, "messages": [{"role": "user", "content": "A wonderful film."}]}
    body = f"-H 'Content-Type: application/json' -d '{json.dumps(asked)}'"
    answer = json.loads(people.type("north", f"curl --silent --fail --retry 60 --retry-connrefused {body} {url}"))
    return str(answer["choices"][0]["message"]["content"])


def main() -> None:
    results = Results("afternoon", "make bench-afternoon")
    with tempfile.TemporaryDirectory() as temporary, Network(SILOS) as network:
        folder = Path(temporary)
        package = wheel(folder)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        people = People(folder, folder / "venv" / "bin" / "python", network)
        prepare(people)
        try:
            started = time.perf_counter()
            answer = walk(people, package, network.address)
            minutes = (time.perf_counter() - started) / 60
        finally:
            people.end()
        if not answer:
            raise RuntimeError("the gateway answered nothing")
        print("\n".join(people.typed), f"\n{answer}")
    results.add(
        "commands typed, from the wheel to an answer of the gateway", len(people.typed), "commands", at_most=COMMANDS
    )
    results.add("from the wheel to an answer", minutes, "minutes", at_most=MINUTES)
    print(f"written: {results.write()}")


if __name__ == "__main__":
    main()
