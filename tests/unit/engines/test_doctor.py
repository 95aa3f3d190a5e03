"""What is wrong with a party is named, whatever is wrong beside it; of a party with nothing wrong nothing is said."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines import doctor
from isthmus.engines.doctor import Diagnosis, diagnose, disk_needed, memory_needed
from isthmus.engines.reachability import Finding
from isthmus.errors import RecipeError
from isthmus.joining.join import join_federation
from isthmus.recipe import Recipe
from isthmus.wire.authority import Authority
from isthmus.wire.identity import save_identity
from tests.conftest import make_recipe, save_tiny_model
from tests.integration.processes import free_port, write_federation
from tests.unit.joining.test_join import Coordinator, rows


@pytest.fixture(scope="module")
def leader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path_factory.mktemp("federation") / "leader")
    with made.serving():
        yield made


@pytest.fixture(scope="module")
def joined(leader: Coordinator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a silo that has joined, to be copied."""
    folder = tmp_path_factory.mktemp("silo")
    invite = leader.authority.invite("north")
    return join_federation(invite, folder / "north", rows(folder / "north" / "data")).folder


@pytest.fixture
def silo(joined: Path, tmp_path: Path) -> Path:
    """A copy of the silo's folder, with its own rows."""
    copied = tmp_path / "north"
    shutil.copytree(joined, copied)
    text = (copied / "recipe.toml").read_text()
    (copied / "recipe.toml").write_text(text.replace(str(joined / "data"), str(copied / "data")))
    return copied


def states(found: Diagnosis) -> dict[str, str]:
    """The worst state by check."""
    order = ["ok", "warning", "failed"]
    worst: dict[str, str] = {}
    for one in found.findings:
        worst[one.check] = max(worst.get(one.check, "ok"), one.state, key=order.index)
    return worst


def failed(found: Diagnosis) -> dict[str, Finding]:
    return {one.check: one for one in found.findings if one.state == "failed"}


def examined(folder: Path, name: str | None = None) -> Diagnosis:
    return diagnose(folder / "recipe.toml", name, dry=False)


def test_of_a_silo_with_nothing_wrong_nothing_is_said(silo: Path) -> None:
    found = examined(silo)
    assert (found.party, found.role, found.failed) == ("north", "silo", False)
    assert set(states(found).values()) == {"ok"}, found.findings
    wanted = {"recipe", "certificate", "model", "disk", "memory", "rows", "trunk", "root", "clock of trunk"}
    assert wanted < states(found).keys()
    assert not any(one.remedy for one in found.findings)


@pytest.mark.process
def test_the_dry_run_measures_and_estimates(silo: Path) -> None:
    said: list[str] = []
    found = diagnose(silo / "recipe.toml", notify=said.append)
    assert not found.failed, found.findings
    assert found.dry_run is not None
    assert found.dry_run.steps == 10
    recipe = Recipe.read(silo / "recipe.toml")
    assert found.round_seconds == pytest.approx(recipe.train.steps * found.dry_run.step_seconds)
    assert found.run_seconds == pytest.approx(recipe.train.rounds * found.round_seconds)
    assert any("ten steps" in one for one in said)


@pytest.mark.process
def test_frames_that_are_too_large_are_found_before_they_are_sent(silo: Path) -> None:
    recipe = silo / "recipe.toml"
    text = recipe.read_text().replace("[train]\n", "[train]\nmax_tokens = 256\n")
    recipe.write_text(text.replace("[wire]\n", "[wire]\nmax_frame_bytes = 40000\n"))
    found = diagnose(recipe)
    assert "raise wire.max_frame_bytes" in failed(found)["frames"].remedy


FAULTS: dict[str, Callable[[Path], Any]] = {
    "certificate": lambda silo: (silo / "certificates" / "north" / "key.pem").chmod(0o644),
    "rows": lambda silo: (silo / "data" / "own.jsonl").write_text('{"text": null}\n'),
    "model": lambda silo: (silo / "model" / "config.json").write_text("{"),
}


@pytest.mark.parametrize("faults", [named for size in (1, 2, 3) for named in itertools.combinations(FAULTS, size)])
def test_each_of_several_faults_is_named_with_a_remedy(silo: Path, faults: tuple[str, ...]) -> None:
    for name in faults:
        FAULTS[name](silo)
    found = examined(silo, "north")
    assert failed(found).keys() >= set(faults)
    assert all(one.remedy for one in failed(found).values())
    if faults == ("rows",):
        assert failed(found).keys() == {"rows"}


@pytest.mark.parametrize(
    ("text", "told"),
    [("[model", "is not TOML"), ("sede = 1", "sede"), (None, "cannot read")],
)
def test_a_recipe_that_cannot_be_read_ends_the_checks(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "recipe.toml").write_text(text)
    found = examined(tmp_path)
    assert told in failed(found)["recipe"].words
    assert len(found.findings) == 1


def test_the_party_is_named_unless_one_certificate_is_here(tmp_path: Path) -> None:
    recipe = write_federation(tmp_path)
    assert "of its certificates none is" in failed(examined(tmp_path))["recipe"].words
    authority = Authority()
    for name in ("north", "south"):
        save_identity(authority.issue(name), tmp_path / "certificates")
    assert "those of north, south are" in failed(examined(tmp_path))["recipe"].words
    assert "no party 'east'" in failed(examined(tmp_path, "east"))["recipe"].words
    with pytest.raises(RecipeError, match="no party"):
        Recipe.read(recipe).tree.role("east")


@pytest.mark.parametrize(
    ("issued", "told"),
    [
        ({"days": -1.0}, "expired on"),
        ({"role": "edge"}, "that of the edge, silo is needed"),
        ({"name": "south"}, "is south's"),
    ],
)
def test_a_certificate_that_is_not_the_partys(tmp_path: Path, issued: dict[str, Any], told: str) -> None:
    write_federation(tmp_path)
    made = Authority().issue(**{"name": "north", **issued})
    save_identity(made, tmp_path / "certificates")
    if made.name != "north":
        (tmp_path / "certificates" / made.name).rename(tmp_path / "certificates" / "north")
    assert told in failed(examined(tmp_path, "north"))["certificate"].words


def test_a_certificate_that_nothing_renews_is_worth_a_warning(tmp_path: Path) -> None:
    write_federation(tmp_path)
    save_identity(Authority().issue("north", days=0.01), tmp_path / "certificates")
    found = {one.check: one for one in examined(tmp_path, "north").findings}
    assert found["certificate"].state == "warning"
    assert "nothing renews it" in found["certificate"].words


def test_servers_that_are_away_are_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    address = {"address": f"localhost:{free_port()}"}
    write_federation(tmp_path, trunk=address, root=address)
    save_identity(Authority().issue("north"), tmp_path / "certificates")
    found = examined(tmp_path, "north")
    assert failed(found).keys() == {"trunk", "root"}
    assert states(found)["rows"] == "ok"


def test_a_device_that_is_not_here_is_named(silo: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    recipe = silo / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('name = "north"', 'name = "north"\ndevice = "cuda"'))
    assert "cuda" in failed(examined(silo, "north"))["device"].words


@pytest.mark.parametrize(("times", "state"), [(0.5, "failed"), (1.5, "warning"), (3.0, "ok")])
def test_disk_and_memory_are_judged_by_what_the_role_needs(
    silo: Path, monkeypatch: pytest.MonkeyPatch, times: float, state: str
) -> None:
    recipe = Recipe.read(silo / "recipe.toml")
    disk, memory = disk_needed(recipe, "north", "silo") + doctor.SPARE, memory_needed(recipe, "north", "silo")
    usage = shutil.disk_usage(silo)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=int(times * disk)))
    monkeypatch.setattr(doctor, "free_memory", lambda: int(times * memory))
    found = states(examined(silo, "north"))
    assert (found["disk"], found["memory"]) == (state, state)


def test_what_roles_need_grows_with_what_they_keep(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    small, more = make_recipe(model), make_recipe(model, train={"keep_rounds": 100})
    once = make_recipe(model, boundary={"release_once": True}, lora={"freeze_bottom": True})
    for role, name in (("silo", "a"), ("trunk", "trunk"), ("root", "root")):
        assert 0 < disk_needed(small, name, role) < disk_needed(more, name, role)  # type: ignore[arg-type]
        assert memory_needed(small, name, role) >= doctor.RUNTIME  # type: ignore[arg-type]
    assert disk_needed(once, "trunk", "trunk") > once.trunk.kept_bytes


@pytest.fixture
def servers(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of trunk, root or an edge."""

    def write(name: str, *, also: tuple[str, ...] = (), **sections: Any) -> Path:
        edge = {"name": "left", "address": f"localhost:{free_port()}", "silos": ["north"]}
        address = {role: {"address": f"localhost:{free_port()}"} for role in ("trunk", "root")}
        write_federation(tmp_path, **{"edge": [edge], **address, **sections})
        role = "edge" if name == "left" else None
        save_identity(Authority().issue(name, role, also=also), tmp_path / "certificates")  # type: ignore[arg-type]
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["trunk", "root", "left"])
def test_a_server_has_a_free_port_and_the_right_names(servers: Callable[..., Path], name: str) -> None:
    found = examined(servers(name))
    assert (found.party, found.role) == (name, "edge" if name == "left" else name)
    assert states(found)["port"] == states(found)["names"] == "ok"
    assert failed(found).keys() == ({"root"} if name == "left" else set())  # nobody is above the edge
    assert "rows" not in states(found)


def test_a_trunk_that_is_the_root_needs_both_names(servers: Callable[..., Path]) -> None:
    address = {"address": f"localhost:{free_port()}"}
    folder = servers("trunk", trunk=address, root=address)
    assert "not for the name root" in failed(examined(folder))["names"].words
    folder = servers("trunk", also=("root",), trunk=address, root=address)
    assert states(examined(folder))["names"] == "ok"


def test_a_port_that_is_taken_is_told_from_the_role_that_runs(
    leader: Coordinator, servers: Callable[..., Path]
) -> None:
    here = {one.check: one for one in diagnose(leader.recipe_path, "trunk").findings}
    assert here["port"].words == f"trunk runs at {leader.recipe.trunk.address}"
    found = failed(examined(servers("trunk", trunk={"address": leader.recipe.trunk.address})))
    assert f"{leader.recipe.trunk.address} is taken by another program" in found["port"].words


@pytest.mark.parametrize(
    ("address", "state", "told"),
    [
        ("nowhere.invalid:7001", "failed", "not known here"),
        ("192.0.2.1:7001", "warning", "not an address of this machine"),
    ],
)
def test_an_address_that_is_not_this_machines(
    servers: Callable[..., Path], address: str, state: str, told: str
) -> None:
    found = {one.check: one for one in examined(servers("trunk", trunk={"address": address})).findings}
    assert found["port"].state == state
    assert told in found["port"].words
