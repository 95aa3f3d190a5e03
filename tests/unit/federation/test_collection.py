"""Collecting open updates and edges' sums: who is waited for, what counts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.errors import FrameError, ProtocolError
from isthmus.federation.collection import Collected, Open, Sums
from isthmus.updates.flat import Layout
from isthmus.updates.quantize import Ring
from isthmus.updates.sums import SumFormat
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.barrier import Barrier

LAYOUT = Layout({"x": (3,)})
RING = Ring(2, 1.0)
FORMAT = SumFormat(LAYOUT, RING)


class Collecting:
    """A collection, and what it was done with."""

    def __init__(self, *, sums: bool = False) -> None:
        self.found: list[Collected] = []
        done = self.found.append
        make = lambda fire: Barrier(600.0, fire)  # noqa: E731
        self.one = (
            Sums(dict.fromkeys("ab", FORMAT), make, done) if sums else Open(dict.fromkeys("ab", LAYOUT), make, done)
        )  # type: ignore[arg-type]


def update(value: float = 1.0, weight: float = 2.0) -> pb.Update:
    tensors = codec.encode_named({"x": torch.full((3,), value)}) if weight else []
    return pb.Update(round=1, weight=weight, tensors=tensors)


def masked(whole: int, silos: int = 2) -> pb.Update:
    numbers = np.full(3, whole, np.int64)
    total = np.concatenate([numbers, silos * RING.encode_share(1.0).astype(np.int64)])
    return pb.Update(round=1, silos=silos, masked=RING.written(RING.pack(total)))


def test_it_is_done_when_all_have_contributed() -> None:
    collecting = Collecting()
    collecting.one.handle("b", update(2.0, weight=3.0))
    assert collecting.one.awaits("a")
    assert not collecting.found
    collecting.one.handle("a", update(1.0))
    (found,) = collecting.found
    assert found.weights == {"a": 2.0, "b": 3.0}
    assert [(one.name, one.weight, one.change["x"][0].item()) for one in found.contributions] == [
        ("a", 2.0, 1.0),
        ("b", 3.0, 2.0),
    ]


def test_who_learned_nothing_is_noted_but_adds_nothing() -> None:
    collecting = Collecting()
    collecting.one.handle("a", update(weight=0.0))
    collecting.one.handle("b", update())
    assert collecting.found[0].weights == {"a": 0.0, "b": 2.0}
    assert [one.name for one in collecting.found[0].contributions] == ["b"]


def test_the_lost_are_not_waited_for() -> None:
    collecting = Collecting()
    assert not collecting.one.lose("a")
    collecting.one.handle("b", update())
    assert list(collecting.found[0].weights) == ["b"]
    alone = Collecting()
    alone.one.lose("a")
    assert alone.one.lose("b"), "nobody is left and nothing was contributed"


def test_what_is_not_due_is_refused_and_may_be_sent_rightly_afterwards() -> None:
    collecting = Collecting()
    wrong = {
        ProtocolError: [pb.Deal(round=1), masked(5)],
        FrameError: [pb.Update(round=1, weight=1.0, tensors=codec.encode_named({"x": torch.zeros(4)}))],
    }
    for error, requests in wrong.items():
        for request in requests:
            with pytest.raises(error):
                collecting.one.handle("a", request)
    with pytest.raises(ProtocolError, match="c is no participant"):
        collecting.one.handle("c", update())
    collecting.one.handle("a", update())
    with pytest.raises(ProtocolError, match="a is no participant"):
        collecting.one.handle("a", update())


def test_sums_of_edges_add_up_exactly() -> None:
    collecting = Collecting(sums=True)
    collecting.one.handle("a", masked(RING.levels))
    collecting.one.handle("b", masked(3))
    (found,) = collecting.found
    assert found.total_KS is not None
    assert found.total_KS[:3].tolist() == [RING.levels + 3] * 3
    assert found.contributions[0].weight == 2.0
    torch.testing.assert_close(found.contributions[0].change["x"], torch.full((3,), 0.5, dtype=torch.float64))


def test_a_sum_beyond_what_its_silos_can_add_is_refused() -> None:
    collecting = Collecting(sums=True)
    with pytest.raises(FrameError, match="the sum of a is beyond"):
        collecting.one.handle("a", masked(2 * RING.levels + 1))
    with pytest.raises(ProtocolError, match="updates are masked"):
        collecting.one.handle("a", update())


def test_a_sum_of_no_share_means_nothing() -> None:
    assert FORMAT.mean(np.zeros(FORMAT.size, np.int64)) is None
    assert FORMAT.within(np.ones(FORMAT.size, np.int64)) is None, "nobody says"


def test_a_sum_of_more_silos_than_were_named_is_refused() -> None:
    collecting = Collecting(sums=True)
    with pytest.raises(ProtocolError, match="a claims 3 silos for its sum, it has named 2"):
        collecting.one.handle("a", masked(1, silos=3))
    for peer in "ab":
        collecting.one.handle(peer, masked(1))
    assert len(collecting.found) == 1
