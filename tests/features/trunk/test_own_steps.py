"""Silos with steps of their own number, and ascent passes that teach the adapter nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import FrameError, OutOfOrderError
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.oracle.twins import assert_same
from tests.unit.trunk.drill import Drill, Silo, Work, decoded, recipe_of, results, tensors_of
from tests.unit.trunk.talk import WAIT

PAIR = ("a", "b")
ONE: Work = (1, (3, 5))
OTHER: Work = (2, (4,))


def uneven(model: Path, steps: int = 1, **trunk: float) -> Recipe:
    """Of two silos; a takes so many steps, b three."""
    recipe = recipe_of(model, silos=PAIR, train={"steps": 3, "learning_rate": 0.01}, gather=0.0, **trunk)
    silos = tuple(silo.model_copy(update={"steps": steps if silo.name == "a" else None}) for silo in recipe.silo)
    return recipe.model_copy(update={"silo": silos})


def ascent_pass(silo: Silo, step: int, work: Work, *, reply: bool = True) -> Answer:
    gradient = codec.encode(tensors_of(work)[1], "fp32")
    return silo.channel.submit(pb.Backward(step=step, gradient=gradient, reply=reply, ascent_pass=True))


def test_a_silo_that_is_done_leaves_the_steps_to_the_others(model: Path, tmp_path: Path) -> None:
    drill = Drill(uneven(model), tmp_path)
    a, b = (drill.silos[name] for name in PAIR)
    drill.begin(names=PAIR)
    a.work(ONE)
    b.work(OTHER)
    assert [one.contributors for one in results([a.commit(1, 3.0), b.commit(1, 1.0)])] == [2, 2]
    with pytest.raises(OutOfOrderError, match="optimizer step 2; a round has 1"):
        a.commit(2, 3.0).result(WAIT)
    for step in (2, 3):
        b.work(OTHER)
        assert b.commit(step, 1.0).result(WAIT).contributors == 1
    assert_same(drill.directory.load_round(1)["adapter"], drill.adapter(), 0.0)
    assert [line["silos"] for line in read_journal(drill.directory.path / "metrics.jsonl")] == [
        ["a", "b"],
        ["b"],
        ["b"],
    ]
    drill.begin(2, PAIR)
    drill.service.stop()


def test_a_round_goes_on_from_who_was_done_if_the_other_dies(model: Path, tmp_path: Path) -> None:
    """b took a step more and was not heard of again: its update will not come either, so that step is undone."""
    drill = Drill(uneven(model), tmp_path)
    a, b = (drill.silos[name] for name in PAIR)
    drill.begin(names=PAIR)
    a.work(ONE)
    b.work(OTHER)
    results([a.commit(1, 3.0), b.commit(1, 1.0)])
    done = drill.adapter()
    b.work(OTHER)
    results([b.commit(2, 1.0)])
    assert any(not torch.equal(tensor, done[name]) for name, tensor in drill.adapter().items())
    drill.begin(2, ("a",))
    assert_same(drill.adapter(), done, 0.0)
    drill.service.stop()


def test_nobody_waits_for_the_frames_of_who_is_done(model: Path, tmp_path: Path) -> None:
    """The frame of the one at work runs at once, though frames of silos at work wait half a minute for one another."""
    drill = Drill(uneven(model), tmp_path)
    a, b = (drill.silos[name] for name in PAIR)
    drill.begin(names=PAIR)
    results([a.commit(1, 0.0), b.commit(1, 0.0)])
    assert drill.service._training.expected == 1
    drill.service.stop()


def test_a_pass_aside_gives_its_inputs_gradient_and_teaches_nothing(model: Path, tmp_path: Path) -> None:
    train = {"steps": 1}
    there = Drill(recipe_of(model, silos=PAIR, train=train), tmp_path / "there")
    alone = Drill(recipe_of(model, silos=PAIR, train=train, gather=0.0), tmp_path / "alone")
    for drill in (there, alone):
        drill.begin(names=PAIR)
    a, b = (there.silos[name] for name in PAIR)
    results([a.forward(ONE), b.forward(OTHER)])
    learned, told = b.backward(b.last, OTHER), ascent_pass(a, a.last, ONE)  # of one pass, and run backward together
    first = decoded(told)
    results([learned])
    assert there.passes == [[3, 5, 4]]
    state = there.service._training._silos["a"]
    assert (state.gradients, state.open) == (None, {})
    results([a.forward(ONE), b.forward(OTHER)])
    counts, other = a.backward(a.last, ONE), b.backward(b.last, OTHER)
    results([other])
    assert torch.equal(first, decoded(counts))
    alone.silos["a"].work(ONE)
    for one, once in zip(there.gradients("a"), alone.gradients("a"), strict=True):
        torch.testing.assert_close(one, once, rtol=1e-4, atol=1e-6)
    for drill in (there, alone):
        drill.service.stop()


def test_a_backward_for_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    drill = Drill(recipe_of(model, silos=("a",), train={"steps": 1}, gather=0.0), tmp_path)
    drill.begin(names=("a",))
    a = drill.silos["a"]
    results([a.forward(ONE)])
    with pytest.raises(FrameError, match="neither learned from nor answered"):
        ascent_pass(a, a.last, ONE, reply=False).result(WAIT)
    results([a.backward(a.last, ONE)])
    drill.service.stop()
