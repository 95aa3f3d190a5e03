"""Several trunks serve one finished run: when one is killed, what it had begun goes on at another, token for token."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_trunks
from isthmus.engines.roles import Serving, serve
from isthmus.errors import PeerGoneError, ProtocolError, RecipeError, RunError
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.client import GrpcChannel
from tests.integration.processes import Command, Commands, free_port, run_here, write_federation
from tests.integration.test_replay import LENGTH, Once, answer
from tests.oracle.twins import prompts

pytestmark = pytest.mark.process
NOISE = 0.05
REACH = 30.0
"""Seconds that a silo waits for a trunk that is gone, where there is no other."""


class Replicas:
    """Trunk processes with addresses of their own, each of which can be killed and started again."""

    def __init__(self, commands: Commands, *arguments: object) -> None:
        self._commands, self._arguments = commands, arguments
        self._running: dict[str, Command] = {}
        for _ in range(2):
            self.start(f"localhost:{free_port()}")

    @property
    def addresses(self) -> list[str]:
        return list(self._running)

    def start(self, address: str) -> None:
        """Start the one at this address, and wait until it listens."""
        self._running[address] = self._commands.start("trunk", *self._arguments, "--address", address)
        assert self._running[address].address == address

    def kill(self, address: str) -> None:
        self._running[address].process.kill()
        self._running[address].wait()


class Balancer:
    """One address for several servers: a connection goes to the first that takes it, and stays there."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses
        self.used: list[str] = []
        """The server of each connection so far."""
        self._listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = self._connect()
                if far is None:
                    near.close()
                    continue
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=_copy, args=(source, target), daemon=True).start()

    def _connect(self) -> socket.socket | None:
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            with suppress(OSError):
                far = socket.create_connection((host, int(port)))
                self.used.append(address)
                return far
        return None


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run."""
    folder = tmp_path_factory.mktemp("federation")
    train, wire = {"rounds": 1, "steps": 3, "evaluate": False}, {"deadline": REACH}
    boundary = {"forward": {"noise": NOISE}}
    run_here(write_federation(folder / "made", train=train, boundary=boundary, wire=wire), folder / "run")
    return RunDirectory(folder / "run")


@pytest.fixture(scope="module")
def replicas(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield Replicas(commands, run.path, "--replica")
    commands.end()


def used_by(silo: Silo) -> str:
    """The address of the trunk that a silo has now."""
    assert isinstance(silo.trunk.channel, GrpcChannel)
    return silo.trunk.channel.address


def files_of(run: RunDirectory) -> dict[Path, tuple[int, int]]:
    """The trunk's files, with size and time of the last change."""
    found = {path: path.stat() for path in run.role("trunk").path.rglob("*") if path.is_file()}
    return {path: (one.st_size, one.st_mtime_ns) for path, one in found.items()}


def test_replicas_write_nothing_into_the_folder_that_they_share(
    commands: Commands, run: RunDirectory, tmp_path: Path
) -> None:
    before = files_of(run)
    replicas = Replicas(commands, run.path, "--replica")
    for address in replicas.addresses:
        with isthmus.open(run.path, trunk=address) as silo:
            assert len(answer(silo))
    assert files_of(run) == before


def test_a_killed_replica_costs_no_token(replicas: Replicas, run: RunDirectory) -> None:
    draw = random.Random(0)
    with isthmus.open(run.path, trunk=",".join(replicas.addresses)) as silo:
        undisturbed = answer(silo)
        released = silo.boundary.released_bytes["forward"]
        for number in range(2, 5):
            before = used_by(silo)
            killer = Once(draw.randrange(2, LENGTH), partial(replicas.kill, before))
            assert torch.equal(answer(silo, killer), undisturbed)
            assert used_by(silo) != before
            assert silo.boundary.released_bytes["forward"] == number * released, "nothing was released twice"
            replicas.start(before)


def test_replicas_behind_one_address_cost_no_token(replicas: Replicas, run: RunDirectory) -> None:
    """As a service of Kubernetes has it, or a name with several addresses."""
    with closing(Balancer(replicas.addresses)) as balancer, isthmus.open(run.path, trunk=balancer.address) as silo:
        undisturbed = answer(silo)
        first = balancer.used[-1]
        assert torch.equal(answer(silo, Once(LENGTH // 2, partial(replicas.kill, first))), undisturbed)
        assert balancer.used[-1] != first
        connections = len(balancer.used)
        assert torch.equal(answer(silo), undisturbed)
        assert len(balancer.used) == connections, "it stays where it is"
        replicas.start(first)


def test_a_run_is_opened_while_a_replica_is_gone(replicas: Replicas, run: RunDirectory) -> None:
    for gone in replicas.addresses:
        replicas.kill(gone)
        with isthmus.open(run.path, trunk=",".join(replicas.addresses)) as silo:
            assert used_by(silo) != gone
            assert len(answer(silo))
        replicas.start(gone)


def test_a_replica_trains_nothing(replicas: Replicas, run: RunDirectory) -> None:
    with isthmus.open(run.path, trunk=replicas.addresses[0]) as silo:
        before = answer(silo)
        with pytest.raises(ProtocolError, match="is a replica, which trains nothing"):
            silo.trunk.channel.call(pb.Begin(open=True, participants=["north"]))
        assert torch.equal(answer(silo), before)


def test_who_trains_turns_to_no_other_trunk(replicas: Replicas, run: RunDirectory) -> None:
    """Which would not have what it trained."""
    with isthmus.open(run.path, trunk=",".join(replicas.addresses)) as silo:
        first = used_by(silo)
        silo.model.train()
        with pytest.raises(ProtocolError, match="is a replica"):
            silo.model(**prompts((5,)), labels=prompts((5,))["input_ids"]).loss.backward()
        silo.served.release()
        replicas.kill(first)
        with pytest.raises(PeerGoneError):
            silo.trunk.channel.submit(pb.Ping()).result()
        replicas.start(first)


def test_beside_replicas_no_trunk_trains_from_their_folder(
    replicas: Replicas, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.storage.record.LOCK_SECONDS", 0.1)
    with pytest.raises(RunError, match="another process of trunk uses"):
        serve(run.path, Path("runs/trunk"), ("trunk",), "localhost:0")


@pytest.mark.parametrize(("roles", "whole"), [(("trunk", "root"), True), (("trunk",), False)])
def test_only_a_finished_runs_trunk_has_replicas(roles: tuple[str, ...], whole: bool, run: RunDirectory) -> None:
    with pytest.raises(RecipeError, match="serves the trunk of a finished run, and that alone") as told:
        serve(run.path if whole else run.recipe_path, Path("runs/trunk"), roles, None, Serving(replica=True))
    assert "isthmus trunk DIR --replica" in told.value.remedy


def test_without_rounds_trunks_of_their_own_are_replicas(commands: Commands, tmp_path: Path) -> None:
    """Nothing was learned: what the recipe names is all."""
    silos = [{"name": "north"}, {"name": "south"}]
    path = write_federation(tmp_path / "made", train={"rounds": 0, "evaluate": False}, silo=silos)
    make_certificates(Recipe.read(path), tmp_path / "made" / "certificates")
    trunks = {}
    for name in ("one", "other"):
        trunk = commands.start("trunk", path, "--run-dir", tmp_path / name, "--address", f"localhost:{free_port()}")
        trunks[trunk.address] = trunk
    recipe = at_trunks(Recipe.read(path), ",".join(trunks))
    with join(recipe, "north", run_dir=tmp_path / "north") as silo:
        undisturbed = answer(silo)
        assert torch.equal(answer(silo, Once(LENGTH // 2, trunks[used_by(silo)].process.kill)), undisturbed)
