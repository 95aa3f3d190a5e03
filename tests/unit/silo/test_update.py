"""A silo's update: open with its weight, or under masks with its share; what compression leaves out stays for later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.errors import IdentityError, PeerGoneError, ProtocolError, RoundLostError
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.update import AggregatorClient, MaskedUpdates, NoisedUpdates, OpenUpdates, update_sizes, updates_of
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, LoopbackChannel, answered
from isthmus.wire.identity import save_identity
from tests.conftest import make_recipe

LAYOUT = Layout({"x": (40,)})
CHANGE = {"x": torch.linspace(-0.1, 0.1, 40)}
SILOS = ("a", "b", "c")


class Aggregator:
    """Keeps what comes; may be gone."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.error: Exception | None = None

    def handle(self, peer: str, request: Message) -> Answer:
        if self.error is not None:
            raise self.error
        self.seen.append(request)
        return answered(pb.Plan(round=1) if isinstance(request, pb.Ready) else pb.Accepted())


def recipe_of(folder: Path, **federation: Any) -> Recipe:
    authority = Authority()
    for name in SILOS:
        save_identity(authority.issue(name), folder)
    return make_recipe(Path("none"), silos=SILOS, federation=federation, wire={"certificates": str(folder)})


def open_updates(folder: Path, **federation: Any) -> tuple[OpenUpdates, Aggregator]:
    recipe, aggregator = recipe_of(folder, **federation), Aggregator()
    channel = LoopbackChannel(aggregator, "a")
    return OpenUpdates(Boundary(recipe.boundary), channel, Compression.of(recipe)), aggregator


def packed(updates: OpenUpdates, round: int = 1, weight: float = 5.0) -> pb.Update:
    plan = pb.Plan(round=round)
    updates.begin(plan, LAYOUT)
    return updates.pack(plan, CHANGE, weight, 1.0, 0.25)


def test_an_open_update_is_the_change_with_its_weight(tmp_path: Path) -> None:
    updates, aggregator = open_updates(tmp_path)
    update = packed(updates)
    assert (update.round, update.weight, update.quality) == (1, 5.0, 0.25)
    torch.testing.assert_close(codec.decode_named(update.tensors, LAYOUT.shapes)["x"], CHANGE["x"])
    updates.send(update)
    assert aggregator.seen == [update]


@pytest.mark.parametrize(
    "compression", [{}, {"bits": 8}, {"kind": "random-k", "keep": 0.1, "bits": 4}, {"kind": "top-k", "keep": 0.1}]
)
def test_the_size_that_is_told_beforehand_is_that_of_what_leaves(tmp_path: Path, compression: dict[str, Any]) -> None:
    recipe = recipe_of(tmp_path, compression=compression)
    change = {"x": torch.randn(2000, generator=torch.Generator().manual_seed(0)), "y": torch.ones(30, 20)}
    layout, plan = Layout.of(change), pb.Plan(round=1)
    updates = OpenUpdates(Boundary(recipe.boundary), LoopbackChannel(Aggregator(), "a"), Compression.of(recipe))
    updates.begin(plan, layout)
    update = updates.pack(plan, change, 1.0, 1.0)
    payload = len(update.compressed) or pb.Update(tensors=update.tensors).ByteSize()
    up, down = update_sizes(recipe, change)
    assert down > 4 * layout.size
    assert payload == pytest.approx(up, rel=0.05 if compression else 0.0)  # entropy coding follows the numbers


def test_the_size_of_a_masked_update_is_two_bytes_a_number(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, secure=True)
    up, down = update_sizes(recipe, {"x": torch.zeros(10_000)})
    assert 2 * 10_000 <= up < 2.5 * 10_000
    assert 4 * 10_000 < down < 4.1 * 10_000


def test_of_no_weight_nothing_of_the_change_leaves(tmp_path: Path) -> None:
    updates, _ = open_updates(tmp_path)
    assert packed(updates, weight=0.0) == pb.Update(round=1)


def test_what_did_not_cross_is_in_the_state_and_comes_later(tmp_path: Path) -> None:
    compression = {"kind": "random-k", "keep": 0.5}
    updates, _ = open_updates(tmp_path, compression=compression)
    packed(updates)
    (left,) = updates.state_dict().values()
    assert left.count_nonzero() == 20
    again, _ = open_updates(tmp_path, compression=compression)
    again.load_state_dict(updates.state_dict())
    fresh, _ = open_updates(tmp_path, compression=compression)
    late, fresh_late = packed(again, round=2), packed(fresh, round=2)
    assert late.compressed != fresh_late.compressed


@pytest.mark.parametrize(
    ("federation", "kind"),
    [
        ({}, OpenUpdates),
        ({"secure": True}, MaskedUpdates),
        (
            {"secure": True, "weights": "equal", "noise": {"epsilon": 8.0}, "clip": {"norm": 1.0}},
            NoisedUpdates,
        ),
    ],
)
def test_updates_are_sent_as_the_recipe_says(tmp_path: Path, federation: dict[str, Any], kind: type) -> None:
    recipe = recipe_of(tmp_path, **federation)
    made = updates_of(recipe, "a", Boundary(recipe.boundary), LoopbackChannel(Aggregator(), "a"), "root")
    assert type(made) is kind
    assert (made.offer() is None) == (kind is OpenUpdates)


def test_a_masked_update_takes_the_others_own_keys(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, secure=True)
    updates = updates_of(recipe, "a", Boundary(recipe.boundary), LoopbackChannel(Aggregator(), "a"), "root")
    keys = updates.offer()
    assert keys is not None
    with pytest.raises(ProtocolError):
        updates.begin(pb.Plan(round=1, participants=["a"], keys={"a": keys, "b": keys}), LAYOUT)
    everyone = dict.fromkeys("abc", keys)
    with pytest.raises(IdentityError):
        updates.begin(pb.Plan(round=1, participants=everyone, keys=everyone), LAYOUT)


def test_a_lone_aggregator_that_is_gone_is_the_error_and_one_with_a_sibling_loses_the_round(tmp_path: Path) -> None:
    edges = [
        {"name": "left", "address": "localhost:1", "silos": ["a", "b"], "sibling": "right"},
        {"name": "right", "address": "localhost:2", "silos": ["c"]},
    ]
    gone = PeerGoneError("gone", remedy="start it")
    for extra, error in (({}, PeerGoneError), ({"edge": edges}, RoundLostError)):
        recipe = make_recipe(Path("none"), silos=SILOS, **extra)
        aggregator = Aggregator()
        client = AggregatorClient(recipe, "a", Boundary(recipe.boundary), LoopbackChannel(aggregator, "a"))
        client.begin(client.ask(0), LAYOUT)
        aggregator.error = gone
        with pytest.raises(error, match="gone"):
            client.send(pb.Update(round=1))
