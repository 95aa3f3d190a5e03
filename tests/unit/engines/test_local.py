"""The local engine: where roles are told to listen and to look, and whom it can lose. Processes are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus.engines import local
from isthmus.engines.lifetime import Stopped
from isthmus.engines.local import at_address, at_edge, at_trunks, create_run, local_recipe, open_resumed, run_federation
from isthmus.errors import DataError, IsthmusError, RecipeError, RunError
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.conftest import make_recipe, write_rows

EDGES = [
    {"name": "left", "address": "localhost:1", "silos": ["a", "b"], "parent": "region", "minimum": 1},
    {"name": "right", "address": "localhost:2", "silos": ["c"], "parent": "region", "minimum": 1},
    {"name": "region", "address": "localhost:3", "minimum": 1},
]


class Stand:
    """In a role's place: it ends after so many looks with this code."""

    started: list[list[str]]

    def __init__(self, title: str, code: int = 0, looks: int = 2) -> None:
        self.title, self._code, self._left, self.ended = title, code, looks, False

    def poll(self) -> int | None:
        self._left -= 1
        return self._code if self._left < 0 else None

    def failure(self) -> IsthmusError:
        return RunError(f"{self.title} fell", remedy="see its log")

    def wait_listening(self, seconds: float) -> str:
        return f"at {self.title}"

    def terminate(self) -> None: ...

    def end(self, seconds: float) -> None:
        self.ended = True


Engine = Callable[..., dict[str, Stand]]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    recipe = make_recipe(Path("none"), silos=("a", "b", "c"), edge=EDGES, root={"minimum": 1})
    return RunDirectory.create(tmp_path / "run", local_recipe(recipe, tmp_path / "run"))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Has stand-ins started in place of roles; gives them by title, each with the ends that are told."""
    started: dict[str, Stand] = {}

    def having(**ends: dict[str, int]) -> dict[str, Stand]:
        def start(title: str, arguments: list[str], log: Path, inherited: tuple[int, ...] = ()) -> Stand:
            server = not title.startswith("silo")
            end = ends.get(title.replace("the ", "").replace(" ", "_"), {"looks": 10**9} if server else {})
            started[title] = Stand(title, **end)
            started[title].started = [arguments]
            return started[title]

        monkeypatch.setattr(local, "RoleProcess", start)
        monkeypatch.setattr(local, "POLL_SECONDS", 0.0)
        return started

    return having


def test_every_role_is_started_and_told_where_the_others_are(run: RunDirectory, engine: Engine) -> None:
    started = engine()
    run_federation(run)
    assert list(started)[:2] == ["the trunk", "edge region"], "who is above listens first"
    (left,) = started["edge left"].started
    assert left[left.index("--parent") + 1] == "at edge region"
    (silo,) = started["silo a"].started
    assert silo[silo.index("--trunk") + 1] == silo[silo.index("--root") + 1] == "at the trunk"
    assert {word for word in silo if "=" in word} == {f"{one}=at edge {one}" for one in ("left", "right", "region")}
    assert all(one.ended for one in started.values())


def test_lost_silos_and_edges_are_told_while_the_others_go_on(run: RunDirectory, engine: Engine) -> None:
    told: list[str] = []
    engine(silo_a={"code": 1, "looks": 0}, edge_left={"code": 1, "looks": 0}, silo_b={"looks": 9}, silo_c={"looks": 9})
    run_federation(run, notify=told.append)
    assert sorted(told) == ["edge left fell", "silo a fell; going on with 2 of 3 silos"]


@pytest.mark.parametrize("lost", ["trunk", "all silos"])
def test_what_nothing_goes_on_without_is_the_runs_failure(run: RunDirectory, engine: Engine, lost: str) -> None:
    fallen = {"code": 1, "looks": 0}
    ends = {"trunk": fallen} if lost == "trunk" else {f"silo_{name}": fallen for name in "abc"}
    started = engine(**ends)
    with pytest.raises(RunError, match="fell"):
        run_federation(run)
    assert all(one.ended for one in started.values())


def test_who_stops_it_is_told_how_to_go_on(run: RunDirectory, engine: Engine) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    engine()
    with pytest.raises(Stopped, match="isthmus run --resume"):
        run_federation(run, stopped)


def test_a_run_is_not_created_for_unusable_data(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "w5", "label": "w6"}])
    values: dict[str, Any] = {"task": {"prompt": "{text}", "answer": "{label}"}}
    bad = make_recipe(Path("none"), silo=[{"name": "a", "train": str(tmp_path / "none.jsonl")}], **values)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        create_run(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    good = make_recipe(Path("none"), silo=[{"name": "a", "train": str(rows)}], **values)
    assert create_run(good, tmp_path / "run").recipe() == local_recipe(good, tmp_path / "run")


def test_the_local_recipe_has_one_server_and_certificates_of_its_own(tmp_path: Path) -> None:
    recipe = local_recipe(make_recipe(Path("none"), root={"address": "elsewhere:1"}), tmp_path)
    assert recipe.root.address == recipe.trunk.address
    assert Path(recipe.wire.certificates) == tmp_path.resolve() / "certificates"


def test_an_address_moves_who_is_named_and_nobody_else() -> None:
    recipe = make_recipe(Path("none"), silos=("a", "b", "c"), edge=EDGES)
    assert at_address(recipe, None) == recipe
    with pytest.raises(RecipeError, match="the address 'there': expected host:port"):
        at_address(recipe, "there")
    moved = at_address(recipe, "there:9", ("trunk", "left"))
    assert (moved.trunk.address, moved.root.address) == ("there:9", recipe.root.address)
    assert [edge.address for edge in moved.edge] == ["there:9", "localhost:2", "localhost:3"]
    assert at_edge(recipe, "right=there:9").edge[1].address == "there:9"


def test_who_uses_a_run_may_name_several_trunks_in_place_of_all() -> None:
    recipe = make_recipe(Path("none"), trunk={"replicas": ["own:1"]})
    assert at_trunks(recipe, None) == recipe
    several = at_trunks(recipe, "one:1,other:2")
    assert (several.trunk.address, several.trunk.replicas) == ("one:1", ("other:2",))
    assert at_trunks(recipe, "one:1").trunk.replicas == ()
    for wrong in ("one:1,other", "one:1,other:0", "one:1,", ",one:1", "one:1, other:2"):
        with pytest.raises(RecipeError, match="expected "):
            at_trunks(recipe, wrong)


def test_a_server_listens_at_one_address() -> None:
    with pytest.raises(RecipeError, match="expected host:port"):
        at_address(make_recipe(Path("none")), "one:1,other:2", ("trunk",))


@pytest.mark.parametrize("told", ["left", "left=", "middle=there:9"])
def test_an_edge_that_is_told_wrongly_is_refused(told: str) -> None:
    recipe: Recipe = make_recipe(Path("none"), silos=("a", "b", "c"), edge=EDGES)
    with pytest.raises(RecipeError):
        at_edge(recipe, told)


def test_certificates_are_made_once(run: RunDirectory, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    real = local.make_certificates

    def counted(recipe: Recipe, folder: Path) -> None:
        made.append(folder)
        real(recipe, folder)

    monkeypatch.setattr(local, "make_certificates", counted)
    for _ in range(2):
        engine()
        run_federation(run)
    assert made == [run.path / "certificates"]


def test_a_deployed_party_is_not_continued_as_a_whole_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", make_recipe(tmp_path / "model"))
    assert open_resumed(run.path).path == run.path
    (run.path / "silos" / "a").mkdir(parents=True)
    with pytest.raises(RunError, match="a party that ran by itself") as refused:
        open_resumed(run.path)
    assert "isthmus silo" in refused.value.remedy
    (run.path / "logs").mkdir()
    assert open_resumed(run.path).path == run.path


def test_a_damaged_round_is_said_to_whoever_continues_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory.create(tmp_path / "run", make_recipe(tmp_path / "model"))
    (run.path / "logs").mkdir()  # as the local engine does
    for role in ("trunk", "root"):
        for number in (1, 2):
            run.role(role).save_round(number, {})
    damaged = run.path / "trunk/rounds/round-0002.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    open_resumed(run.path)
    assert f"{damaged} is passed over" in caplog.text
    assert "going on from round 1" in caplog.text
