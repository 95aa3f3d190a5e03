"""What parties of a moving cut tell one another: checked, bounded, answered once the move is made, and also later."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.engines import moving
from isthmus.engines.local import create_run
from isthmus.engines.moving import (
    RootMoves,
    TrunkMoves,
    check_moves_apart,
    check_sizes,
    decode_moments,
    finished,
    flat_moments,
    moments_by_name,
    recorded_cut,
    staging_of,
)
from isthmus.engines.repartition import CUT, READY, Move
from isthmus.errors import FrameError, ProtocolError, RecipeError
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.vitals import Vitals
from tests.conftest import make_recipe, save_tiny_model
from tests.integration.processes import train_here, write_federation

TRAIN = {"rounds": 4, "steps": 1, "evaluate": False, "learning_rate": 0.1}
MODEL: dict[str, Any] = {"bottom": 1, "top": 2, "moves": [{"after": 2, "bottom": 2, "top": 1}]}
"""Block 1 goes to the silos, block 3 to the trunk."""


@pytest.fixture(scope="module")
def at_the_move(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """All parties' folders in one directory, at the end of the round after which the cut moves."""
    folder = tmp_path_factory.mktemp("federation")
    written = write_federation(folder, train=TRAIN, model=MODEL, federation={"lora": "plain"})
    run = create_run(Recipe.read(written), folder / "run")
    train_here(run)
    assert run.completed() == 2
    return run


@pytest.fixture
def run(at_the_move: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(at_the_move.path, tmp_path / "run")
    return RunDirectory.open(tmp_path / "run")


def moments_of(run: RunDirectory, name: str, move: Move) -> dict[str, torch.Tensor]:
    """A silo's moments of what goes to the trunk."""
    own = move.moments(run.role(name).load_round(2))
    return flat_moments({key: own[key] for key in move.entering})


def the_move(run: RunDirectory) -> Move:
    return Move(run.recipe(), 2, (2, 1))


def ask(moves: TrunkMoves, run: RunDirectory, name: str) -> Any:
    move = the_move(run)
    if name == "root":
        shared = run.role("root").load_round(2)["shared"]
        tensors = {key: shared[key] for key in move.entering}
    else:
        tensors = moments_of(run, name, move)
    return moves.handle(name, pb.Move(after=2, tensors=codec.encode_named(tensors)))


def test_the_trunk_moves_once_all_have_asked_and_answers_from_its_files(run: RunDirectory) -> None:
    move, before = the_move(run), run.role("trunk").load_round(2)
    expected = {name: moments_of(run, name, move) for name in run.silos()}
    moves = TrunkMoves(run.recipe(), run, with_root=True)
    assert moves.handle("north", pb.Ping()).result() == pb.Pong()
    assert moves.handle("north", pb.Move()).result() == pb.Moved()
    for name in run.silos():
        assert not moves.due()
        assert name in moves.vitals().missing
        assert not ask(moves, run, name).done()
    assert moves.due()
    assert moves.vitals() == Vitals("gathering", 0)
    moved = moves.make()
    assert (moved.model.bottom, moved.model.top) == (run.recipe().model.bottom, run.recipe().model.top) == (2, 1)
    state = Move(moved, 2, (2, 1)).trunk_moments(run.role("trunk").load_round(2))
    for name in move.entering:
        means = [moments_by_name(one)[name]["exp_avg"] for one in expected.values()]
        torch.testing.assert_close(state[name]["exp_avg"], torch.stack(means).mean(dim=0))

    later = TrunkMoves(moved, run, with_root=True)
    assert not later.due()
    assert later.vitals() == Vitals("idle", 2)
    assert later.handle("north", pb.Move()).result() == pb.Moved(after=2)
    assert later.handle("north", pb.Move(after=1)).result() == pb.Moved(after=2)  # of a move that was long ago
    answer = later.handle("north", pb.Move(after=2)).result()
    found = decode_moments(answer.tensors, move.leaving, "adamw")
    theirs = move.trunk_moments(before)
    assert found.keys() == move.leaving.keys()
    assert all(torch.equal(found[name]["exp_avg_sq"], theirs[name]["exp_avg_sq"]) for name in found)
    adapters = codec.decode_named(later.handle("root", pb.Move(after=2)).result().tensors, move.leaving)
    assert all(torch.equal(tensor, before["adapter"][name]) for name, tensor in adapters.items())


def test_a_root_elsewhere_is_waited_for_and_silos_for_so_long_as_the_recipe_says(run: RunDirectory) -> None:
    recipe = run.recipe()
    moves = TrunkMoves(recipe, run, with_root=False)
    ask(moves, run, "north")
    assert not moves.due()
    ask(moves, run, "root")
    assert not moves.due()
    root = recipe.root.model_copy(update={"patience": 1e-9})
    moves = TrunkMoves(recipe.model_copy(update={"root": root}), run, with_root=False)
    ask(moves, run, "root")
    moves.due()
    assert moves.due()
    move, before = the_move(run), run.role("trunk").load_round(2)
    shared = run.role("root").load_round(2)["shared"]
    moves.make()
    assert run.role("trunk").rounds() == {0, 2}
    after = run.role("trunk").load_round(2)
    assert after["adapter"].keys() == move.new.whole_trunk.keys()
    for name, tensor in after["adapter"].items():
        assert torch.equal(tensor, shared[name] if name in move.entering else before["adapter"][name])
    assert len(after["optimizer"]["state"]) == len(move.new.trunk) - len(move.entering)  # nobody brought moments
    assert run.role("trunk").load_round(0)["adapter"].keys() == move.new.whole_trunk.keys()


def test_a_root_takes_what_the_trunk_gives_it(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    move, trunk = the_move(run), run.role("trunk").load_round(2)
    given = codec.encode_named({name: trunk["adapter"][name] for name in move.leaving})
    asked: list[pb.Move] = []

    def answer(recipe: Recipe, name: str, role: str, request: pb.Move) -> pb.Moved:
        asked.append(request)
        return pb.Moved(after=2, tensors=given)

    monkeypatch.setattr(moving, "_ask", answer)
    moves = RootMoves(run.recipe(), run)
    while not moves.due():
        pass
    moved, shared = moves.make(), run.role("root").load_round(2)["shared"]
    assert (moved.model.bottom, moved.model.top) == (2, 1)
    assert codec.decode_named(asked[0].tensors, move.entering).keys() == move.entering.keys()
    assert shared.keys() == move.new.ends.keys()
    assert all(torch.equal(shared[name], trunk["adapter"][name]) for name in move.leaving)
    assert not RootMoves(moved, run).due()


def test_what_a_party_may_not_ask_or_bring_is_refused_by_name(run: RunDirectory) -> None:
    recipe, move = run.recipe(), the_move(run)
    moves = TrunkMoves(recipe, run, with_root=True)
    with pytest.raises(ProtocolError, match="would move the cut after round 3; this trunk made its last move after"):
        moves.handle("north", pb.Move(after=3))
    with pytest.raises(FrameError, match="is missing"):
        moves.handle("root", pb.Move(after=2))
    with pytest.raises(FrameError, match="unexpected tensor"):
        moves.handle("north", pb.Move(after=2, tensors=[pb.Tensor(name="x exp_avg", shape=[1], data=bytes(4))]))
    noised = recipe.boundary.model_copy(
        update={"update": recipe.boundary.update.model_copy(update={"clip": 1.0, "noise": 0.1})}
    )
    protected = TrunkMoves(recipe.model_copy(update={"boundary": noised}), run, with_root=True)
    brought = codec.encode_named(moments_of(run, "north", move))
    with pytest.raises(ProtocolError, match="moments of a silo whose updates are protected"):
        protected.handle("north", pb.Move(after=2, tensors=brought))
    protected.handle("north", pb.Move(after=2))


SHAPES = {"a": (2, 3), "b": (4,)}
ADAM = {"exp_avg": torch.randn(2, 3), "exp_avg_sq": torch.rand(2, 3), "step": torch.tensor(7.0)}


def test_moments_come_as_they_left() -> None:
    sent = codec.encode_named(flat_moments({"a": ADAM}))
    found = decode_moments(sent, SHAPES, "adamw")
    assert found.keys() == {"a"}
    assert all(torch.equal(found["a"][key], value) for key, value in ADAM.items())
    assert decode_moments([], SHAPES, "adamw") == {}
    slow = {"b": {"momentum_buffer": torch.randn(4)}, "a": {"momentum_buffer": None}}
    assert decode_moments(codec.encode_named(flat_moments(slow)), SHAPES, "sgd").keys() == {"b"}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"exp_avg": ADAM["exp_avg"]}, "is missing"),
        (ADAM | {"step": torch.tensor(-1.0)}, "no optimizer makes"),
        (ADAM | {"step": torch.tensor(1e9)}, "no optimizer makes"),
        (ADAM | {"step": torch.tensor(float("nan"))}, "NaN"),
        (ADAM | {"exp_avg_sq": -ADAM["exp_avg_sq"]}, "no optimizer makes"),
        (ADAM | {"exp_avg": torch.zeros(3, 2)}, "expected"),
        (ADAM | {"momentum_buffer": torch.zeros(2, 3)}, "unexpected"),
    ],
)
def test_moments_that_no_optimizer_makes_are_refused(state: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(FrameError, match=told):
        decode_moments(codec.encode_named(flat_moments({"a": state})), SHAPES, "adamw")


def test_a_move_that_fits_into_no_frame_is_refused_before_the_first_round(run: RunDirectory) -> None:
    recipe = run.recipe()
    small = recipe.model_copy(update={"wire": recipe.wire.model_copy(update={"max_frame_bytes": 4096})})
    with pytest.raises(
        RecipeError, match=r"change sides are up to [\d,]+ bytes, wire.max_frame_bytes is 4,096"
    ) as told:
        check_sizes(small, 0)
    assert "raise wire.max_frame_bytes to" in told.value.remedy
    check_sizes(small, 3)  # no move is left
    check_sizes(recipe, 0)


def test_edges_of_their_own_are_refused(tmp_path: Path) -> None:
    edge = {"name": "west", "address": "localhost:1", "silos": ["a"]}
    recipe = make_recipe(tmp_path, model={"moves": [{"after": 2, "bottom": 2}]}, edge=[edge])
    with pytest.raises(RecipeError, match="an edge on a machine of its own") as told:
        check_moves_apart(recipe)
    assert "leave out [[edge]]" in told.value.remedy
    check_moves_apart(recipe.model_copy(update={"edge": ()}))


def test_a_party_that_starts_again_has_the_cut_of_its_files(tmp_path: Path) -> None:
    """With the recipe that it was first given, and also if it ended while new files took the places of old ones."""
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"), model=MODEL)
    run = RunDirectory.create(tmp_path / "run", recipe)
    assert finished(run, recipe, ("north",)) == recorded_cut(run, recipe) == recipe
    staged = RunDirectory(run.path / staging_of("north"))
    staged.role("north").save_round(2, {"x": torch.ones(1)})
    assert finished(run, recipe, ("north",)) == recipe  # not all were there
    assert not staged.path.exists()
    run.role("north").save_round(1, {"x": torch.zeros(1)})
    staged.role("north").save_round(2, {"x": torch.ones(1)})
    (staged.path / READY).write_text("2 1\n")
    moved = recipe.moved_to((2, 1))
    assert finished(run, recipe, ("north",)) == recorded_cut(run, recipe) == moved
    assert run.role("north").rounds() == {2}
    assert finished(run, recipe, ("north",)) == moved
    assert (run.role("north").path / CUT).read_text() == "2 1\n"
    run.record(recorded_cut(run, recipe))
