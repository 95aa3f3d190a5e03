"""Trunk, root and silos started one by one, as on machines of their own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.engines.local import at_address
from isthmus.engines.roles import start_server
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from isthmus.wire.authority import Authority
from isthmus.wire.identity import save_identity
from tests.conftest import save_tiny_model
from tests.integration.processes import (
    Commands,
    Ended,
    assert_same,
    call,
    free_port,
    run_here,
    silos_here,
    states,
    until,
    until_step,
    write_federation,
    write_recipe,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
Call = Callable[..., Ended]


@pytest.fixture
def isthmus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in this process."""
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def test_parties_on_machines_of_their_own(commands: Commands, isthmus: Call, tmp_path: Path) -> None:
    """Each party has a folder with the recipe, its own certificate and, a silo, its own text; nobody has more."""
    recipe = write_federation(
        tmp_path / "made",
        train={"rounds": 2, "steps": 5, "evaluate": False},
        trunk={"address": f"localhost:{free_port()}"},
        root={"address": f"localhost:{free_port()}"},
        model={"path": str(tmp_path / "made" / "model")},
    )
    isthmus("certificates", recipe).succeeded()
    machines = {name: _machine(recipe, name, tmp_path) for name in ("trunk", "root", "north", "south")}

    early = commands.start("silo", machines["north"], "north", "--run-dir", _run_of(machines["north"]))
    until(lambda: "no connection to trunk at" in early.stderr, "the silo to miss the trunk", command=early)
    trunk = commands.start("trunk", machines["trunk"], "--run-dir", _run_of(machines["trunk"]))
    root = commands.start("root", machines["root"], "--run-dir", _run_of(machines["root"]))
    late = commands.start("silo", machines["south"], "south", "--run-dir", _run_of(machines["south"]))
    early.wait().succeeded()
    late.wait().succeeded()
    for server, role in ((trunk, "trunk"), (root, "root")):
        assert server.process.is_running()
        address = getattr(Recipe.read(recipe), role).address
        assert server.stdout.startswith(f"listening at {address}\nfinished after 2 rounds")
        server.process.terminate()
        server.wait().succeeded()

    whole = tmp_path / "whole"  # what each wrote, brought together, is what a local run writes
    for machine in machines.values():
        shutil.copytree(_run_of(machine), whole, dirs_exist_ok=True)
    shutil.copy(recipe, whole / "recipe.toml")
    local = write_recipe(recipe.parent / "local.toml", train={"rounds": 2, "steps": 5, "evaluate": False})
    run_here(local, tmp_path / "local")
    assert_same(states(whole, 2), states(tmp_path / "local", 2))
    assert not (_run_of(machines["trunk"]) / "silos").exists()
    assert not (_run_of(machines["root"]) / "silos").exists()


def test_servers_killed_in_mid_round_are_waited_for(
    commands: Commands, isthmus: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The silos stay, and begin the round again with the servers that took their place; nothing else differs."""
    train = {"rounds": 2, "steps": 30, "evaluate": False}
    address = {"address": f"localhost:{free_port()}"}
    recipe = write_federation(tmp_path / "made", train=train, trunk=address, root=address)
    run = tmp_path / "run"
    isthmus("certificates", recipe).succeeded()
    serve = ("trunk", recipe, "--with-root", "--run-dir", run)
    killed = commands.start(*serve)
    with silos_here(Recipe.read(recipe), RunDirectory(run)):
        until_step(run, 2, 5, killed)
        killed.process.kill()
        killed.wait()
        commands.start(*serve)
    assert caplog.text.count("round 2 is lost") == 2
    run_here(recipe, tmp_path / "undisturbed")
    shutil.copy(recipe, run / "recipe.toml")
    assert_same(states(run, 2), states(tmp_path / "undisturbed", 2))


def test_silos_wait_for_a_trunk_that_starts_late_and_for_one_that_stands_still(
    commands: Commands, isthmus: Call, tmp_path: Path
) -> None:
    """Both for several times wire.deadline; what comes of the run is what comes of an undisturbed one."""
    train, address = {"rounds": 2, "steps": 30, "evaluate": False}, {"address": f"localhost:{free_port()}"}
    sections = {"train": train, "wire": {"deadline": 1.0}, "trunk": address, "root": address}
    recipe = write_federation(tmp_path / "made", **sections)
    isthmus("certificates", recipe).succeeded()
    run = tmp_path / "run"
    silos = [commands.start("silo", recipe, name, "--run-dir", run) for name in ("north", "south")]
    for silo in silos:
        until(lambda silo=silo: "no connection to trunk at" in silo.stderr, "a silo to miss the trunk", command=silo)
    time.sleep(3.0)
    assert all(silo.process.is_running() for silo in silos)
    trunk = commands.start("trunk", recipe, "--with-root", "--run-dir", run)
    until_step(run, 2, 5, trunk)
    trunk.process.suspend()
    for silo in silos:
        until(lambda silo=silo: silo.stderr.count("connecting again") > 2, "a silo to give up twice", command=silo)
    trunk.process.resume()
    for silo in silos:
        silo.wait().succeeded()
        assert "is lost" not in silo.stderr
    run_here(recipe, tmp_path / "undisturbed")
    shutil.copy(recipe, run / "recipe.toml")
    assert_same(states(run, 2), states(tmp_path / "undisturbed", 2))


class Federation:
    """A trunk and root that listen in this process, and the files of those who would join."""

    def __init__(self, folder: Path) -> None:
        self.recipe = write_federation(
            folder, train={"rounds": 1, "steps": 2, "evaluate": False}, wire={"deadline": 2.0}
        )
        self.authority = Authority()
        for name in ("trunk", "north", "south", "west"):
            also = ("root",) if name == "trunk" else ()
            save_identity(self.authority.issue(name, also=also), folder / "certificates")
        serving = at_address(Recipe.read(self.recipe), "localhost:0")
        self.server, _ = start_server(serving, RunDirectory(folder / "server"), ("trunk", "root"))
        self._address = f"localhost:{self.server.port}"

    def silo(self, recipe: Path, name: str, run: Path) -> tuple[object, ...]:
        """The command of a silo that joins here."""
        return ("silo", recipe, name, "--run-dir", run, "--trunk", self._address, "--root", self._address)

    def variant(self, folder: Path, **sections: Any) -> Path:
        """A silo's own recipe, with files of the federation where it does not say otherwise."""
        folder.mkdir(exist_ok=True)
        base = self.recipe.parent
        shutil.copytree(base / "certificates", folder / "certificates")
        for name in ("north", "south"):
            shutil.copy(base / f"{name}.jsonl", folder)
        sections = {"model": {"path": str(base / "model")}, "wire": {"deadline": 2.0}, **sections}
        return write_recipe(folder / "recipe.toml", **sections)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"))
    yield made
    made.server.stop()


def test_another_base_model_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "other", seed=1)
    recipe = federation.variant(tmp_path / "north", model={"path": str(tmp_path / "other")})
    isthmus(*federation.silo(recipe, "north", tmp_path / "run")).failed(
        "north and the trunk have different base models", "remedy: give both sides the same files at model.path"
    )


def test_another_cut_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    recipe = federation.variant(
        tmp_path / "north", model={"path": str(federation.recipe.parent / "model"), "bottom": 2}
    )
    isthmus(*federation.silo(recipe, "north", tmp_path / "run")).failed("model.bottom = 2, the trunk 1")


def test_another_seed_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    train = {"rounds": 1, "steps": 2, "evaluate": True, "micro_batches": 2}  # the last two may differ
    recipe = federation.variant(tmp_path / "north", train=train, seed=6, threads=1)
    isthmus(*federation.silo(recipe, "north", tmp_path / "run")).failed(
        "error: north has seed = 6, the trunk 5\n", "remedy: give all parties the same values of these keys"
    )


def test_a_certificate_of_another_authority_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    recipe = federation.variant(tmp_path / "north")
    save_identity(Authority().issue("north"), tmp_path / "north" / "certificates")
    refused = isthmus(*federation.silo(recipe, "north", tmp_path / "run"))
    refused.failed("no trusted connection to trunk", "remedy: both sides need valid certificates of the same authority")
    assert "ssl_transport_security" not in refused.err, "gRPC writes its own lines"


def test_a_foreign_certificate_with_the_right_authority_beside_it_is_refused(
    federation: Federation, isthmus: Call, tmp_path: Path
) -> None:
    """The silo trusts the trunk, but the trunk must not trust the silo: the handshake itself has to fail."""
    recipe = federation.variant(tmp_path / "north")
    foreign = Authority().issue("north")
    place = tmp_path / "north" / "certificates" / "north"
    (place / "cert.pem").write_bytes(foreign.certificate)
    (place / "key.pem").write_bytes(foreign.key)
    isthmus(*federation.silo(recipe, "north", tmp_path / "run")).failed(
        "the certificate of north was signed by another authority", "remedy: join with an invite"
    )


def test_an_expired_certificate_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    recipe = federation.variant(tmp_path / "north")
    save_identity(federation.authority.issue("north", days=-1), tmp_path / "north" / "certificates")
    isthmus(*federation.silo(recipe, "north", tmp_path / "run")).failed(
        "the certificate of north expired on", "or make certificates with 'isthmus certificates RECIPE'"
    )


def test_another_partys_certificate_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    recipe = federation.variant(tmp_path / "north")
    certificates = tmp_path / "north" / "certificates"
    shutil.rmtree(certificates / "north")
    shutil.copytree(certificates / "south", certificates / "north")
    isthmus(*federation.silo(recipe, "north", tmp_path / "run")).failed("the certificate of north is south's")


def test_a_silo_that_the_trunk_does_not_know_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    """West holds a certificate of the federation's authority, but the trunk's recipe does not list it."""
    rows = str(federation.recipe.parent / "north.jsonl")
    recipe = federation.variant(tmp_path / "west", silo=[{"name": "west", "train": rows, "held_out": rows}])
    isthmus(*federation.silo(recipe, "west", tmp_path / "run")).failed(
        "'west' may not connect to this trunk", "remedy: "
    )


def test_a_taken_port_is_named(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    recipe, address = federation.recipe, f"localhost:{federation.server.port}"
    isthmus("trunk", recipe, "--run-dir", tmp_path / "run", "--address", address).failed(
        f"cannot listen at {address}", "remedy: free the port"
    )


def test_one_server_for_two_addresses_is_refused(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    recipe = federation.variant(tmp_path / "both", root={"address": "localhost:7002"})
    isthmus("trunk", recipe, "--with-root", "--run-dir", tmp_path / "run").failed(
        "the trunk is at localhost:7001, the root at localhost:7002", "remedy: give both the same address"
    )


def test_a_finished_federation_lets_a_silo_go_at_once(federation: Federation, isthmus: Call, tmp_path: Path) -> None:
    """Alone in its recipe, north trains its round; started again, it is told that all is done."""
    rows = str(federation.recipe.parent / "north.jsonl")
    recipe = federation.variant(
        tmp_path / "north",
        silo=[{"name": "north", "train": rows, "held_out": rows}],
        train={"rounds": 1, "steps": 2, "evaluate": True},
    )
    server, _ = start_server(
        at_address(Recipe.read(recipe), "localhost:0"), RunDirectory(tmp_path / "server"), ("trunk", "root")
    )
    address = f"localhost:{server.port}"
    run = RunDirectory(tmp_path / "run")
    command = ("silo", recipe, "north", "--run-dir", run.path, "--trunk", address, "--root", address)
    isthmus(*command).succeeded()
    assert run.role("north").rounds() == {1}
    ledger = (run.role("north").path / "ledger.jsonl").read_text()
    isthmus(*command).succeeded()
    assert (run.role("north").path / "ledger.jsonl").read_text() == ledger
    server.stop()


def _machine(recipe: Path, name: str, folder: Path) -> Path:
    """A folder with what this party is given, and nothing else; returns its copy of the recipe."""
    machine = folder / name
    shutil.copytree(recipe.parent / "certificates" / name, machine / "certificates" / name)
    if name in ("north", "south"):
        shutil.copy(recipe.parent / f"{name}.jsonl", machine)
    return Path(shutil.copy(recipe, machine / "recipe.toml"))


def _run_of(recipe: Path) -> Path:
    return recipe.parent / "run"
