"""Flower as real processes: a SuperLink, SuperNodes and ``flwr run``, from the environment that ``make`` builds."""

from __future__ import annotations

import os
import subprocess
import textwrap
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from isthmus.engines.flower import courier
from isthmus.engines.flower.app import PACKAGE
from isthmus.wire.authority import Authority
from tests.integration.processes import free_port, until

BIN = Path("build/flower/bin").absolute()
needs_flower = pytest.mark.skipif(not (BIN / "flwr").exists(), reason="no Flower here: make build/flower/ready")
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Program:
    """A program of Flower's, with its output in a file."""

    def __init__(self, home: Path, title: str, *words: object) -> None:
        self._output = home / f"{title}.log"
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        with self._output.open("ab") as output:
            self.process = psutil.Popen(
                [str(BIN / str(words[0])), *map(str, words[1:])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | SETTINGS | {"FLWR_HOME": str(home), "PATH": path},
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def until(self, told: str, times: int = 1) -> None:
        """Wait until it has said this so many times."""
        until(lambda: self.output.count(told) >= times, f"{told!r} in {self.output[-2000:]}")

    def stop(self) -> None:
        """End it as its user would: a SuperNode takes its leave, and may come back at once."""
        self.process.terminate()
        self.process.wait(30)

    def end(self) -> None:
        """Kill it and all that it has started."""
        try:
            children = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        for one in (self.process, *children):
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class SuperLink:
    """A SuperLink while the block runs; all programs that were started with it end with it.

    Args:
        home: a new folder for Flower's files.
        simulation: for simulated nodes, without TLS; else with TLS and node authentication.
    """

    def __init__(self, home: Path, *, simulation: bool = False) -> None:
        home.mkdir(parents=True)
        self.home, self.port = home, free_port()
        self._programs = ExitStack()
        link = [f'address = "localhost:{self.port}"', "insecure = true"]
        words = ["--insecure", "--simulation"]
        if not simulation:
            authority = Authority()
            served = authority.issue("superlink", "root", also=("localhost",))
            for name, data in (("ca", authority.certificate), ("cert", served.certificate), ("key", served.key)):
                (home / f"{name}.pem").write_bytes(data)
            link[1] = f'root-certificates = "{home}/ca.pem"'
            files = {"certfile": "cert", "keyfile": "key", "ca-certfile": "ca"}
            words = [word for option, name in files.items() for word in (f"--ssl-{option}", f"{home}/{name}.pem")]
            words.append("--enable-supernode-auth")
        (home / "config.toml").write_text("\n".join(["[superlink]", 'default = "here"', "[superlink.here]", *link]))
        where = ("--host", "localhost", "--port", self.port, "--disable-runtime-dependency-installation")
        self._start("superlink", "flower-superlink", *words, *where).until("Application startup complete")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._programs.close()

    def key(self, name: str, *, register: bool = True) -> Path:
        """A new key for a SuperNode."""
        made, path = ec.generate_private_key(ec.SECP384R1()), self.home / name
        path.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        public = path.with_suffix(".pub")
        public.write_bytes(made.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        if register:
            program = self._start(f"register-{name}", "flwr", "supernode", "register", public, "here")
            assert program.process.wait(60) == 0, program.output
        return path

    def node(self, key: Path, silo: str, socket: Path, more: str = "") -> Program:
        """A SuperNode.

        Args:
            more: of its node config.
        """
        words = ("--superlink", f"localhost:{self.port}", "--root-certificates", self.home / "ca.pem")
        config = f'silo="{silo}" socket="{socket}" {more}'.strip()
        where = ("--auth-supernode-private-key", key, "--node-config", config, "--port", free_port())
        return self._start(f"node-{key.name}", "flower-supernode", *words, *where)

    def run(self, app: Path, *words: object) -> Program:
        """``flwr run`` with its log."""
        return self._start("run", "flwr", "run", app, "here", *words, "--stream")

    def _start(self, title: str, *words: object) -> Program:
        program = Program(self.home, title, *words)
        self._programs.callback(program.end)
        return program


IDENTITY = """
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # what Flower's own launcher would set
"""


def in_flower(folder: Path, code: str) -> None:
    """Run code in Flower's environment, beside the app, in this folder."""
    package = folder / PACKAGE
    package.mkdir()
    for one in Path(courier.__file__).parent.glob("*.py"):
        (package / one.name).write_text(one.read_text())
    words = [str(BIN / "python"), "-c", IDENTITY + textwrap.dedent(code)]
    environment = os.environ | SETTINGS | {"FLWR_HOME": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
