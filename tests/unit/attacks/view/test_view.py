"""A view holds the frames' own bytes, decoded, and nothing else."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.attacks.view.frames import crossings_of, observed_updates
from isthmus.attacks.view.tap import Tap
from isthmus.attacks.view.view import View, aggregator_view, outsider_view
from isthmus.audit.capture import capture_answers, capture_pairs, capture_round, capture_rows, tapped_silo
from isthmus.audit.target import Target
from isthmus.data.tokens import collate
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import AttackError, ProtocolError
from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import greeting, join
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel
from isthmus.wire.frames import VERSION
from tests.conftest import make_recipe
from tests.unit.attacks.attacked import Attacked, random_rows

LONG = 12


def raw(tensors: list[torch.Tensor]) -> bytes:
    return torch.cat(tensors).numpy().tobytes()


class Captured:
    """Frames of a silo that trained two batches, so many times, and answered a prompt with beams."""

    def __init__(self, model: Path, folder: Path, *, times: int = 1, **boundary: Any) -> None:
        recipe = make_recipe(
            model,
            boundary={"forward": {"noise": 0.1}, "gradient": {"noise": 0.2}, **boundary},
            lora={"freeze_bottom": boundary.get("release_once", False)},
        )
        service = TrunkService(recipe, RoleDirectory(folder / "trunk"))
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        self.tap = Tap(LoopbackChannel(service, "a", greeting=hello))
        self.silo = join(recipe, "a", channel=self.tap, releases=folder / "released")
        self.rows = random_rows(6, 3)
        self.silo.rounds.begin(1, ["a"])
        for start in (0, 3) * times:
            self.silo.model(**collate(self.rows[start : start + 3], 0).inputs()).loss.backward()
        self.silo.rounds.commit(1, 1, 7.0)
        service.stop()

    def sent(self, kind: type[Any]) -> list[Any]:
        return [one.request for one in self.tap.exchanges if one.kind is kind]

    def answers(self, kind: type[Any]) -> list[Any]:
        return [one.response for one in self.tap.exchanges if one.kind is kind]


def test_training_rows_are_the_frames_bytes(attacked_model: Path, tmp_path: Path) -> None:
    captured = Captured(attacked_model, tmp_path)
    seen = crossings_of("a", captured.tap.exchanges)
    assert [one.length for one in seen] == [len(row.input) for row in captured.rows]
    assert raw([one.hidden_LD for one in seen]) == b"".join(one.hidden.data for one in captured.sent(pb.Forward))
    assert raw([one.answered_LD for one in seen if one.answered_LD is not None]) == b"".join(
        one.hidden.data for one in captured.answers(pb.Forward)
    )
    assert raw([one.gradient_LD for one in seen if one.gradient_LD is not None]) == b"".join(
        one.gradient.data for one in captured.sent(pb.Backward)
    )
    assert raw([one.returned_LD for one in seen if one.returned_LD is not None]) == b"".join(
        one.gradient.data for one in captured.answers(pb.Backward)
    )
    assert {(one.sender, one.kind, one.round, one.weight) for one in seen} == {("a", "train", 1, 7.0)}


def test_rows_that_were_released_once_are_the_kept_bytes(attacked_model: Path, tmp_path: Path) -> None:
    captured = Captured(attacked_model, tmp_path, release_once=True)
    seen = crossings_of("a", captured.tap.exchanges)
    kept = {one.example: one.hidden.data for one in captured.sent(pb.Keep)}
    numbers = [number for one in captured.sent(pb.Forward) for number in one.examples]
    assert [raw([one.hidden_LD]) for one in seen] == [kept[number] for number in numbers]
    assert all(one.gradient_LD is not None and one.returned_LD is None for one in seen)


def test_answers_that_cross_as_differences_are_read_whole(attacked_model: Path, tmp_path: Path) -> None:
    codecs = {"forward_down": "range-0.25"}
    captured = Captured(attacked_model, tmp_path, times=2, release_once=True, differences=True, codec=codecs)
    assert [list(one.changed) for one in captured.answers(pb.Forward)] == [[], [], [0, 1, 2], [0, 1, 2]]
    answers = [one.answered_LD for one in crossings_of("a", captured.tap.exchanges)]
    for first, again in zip(answers[:6], answers[6:], strict=True):  # nothing has been learned in between
        assert first is not None
        assert again is not None
        assert (first - again).abs().max() < 0.01 * first.abs().max()


def test_a_message_changed_after_it_was_sent_changes_nothing(attacked_model: Path) -> None:
    tap = Tap(LoopbackChannel(ZeroTrunk(make_recipe(attacked_model)), "a"))
    request = pb.Hello(version=VERSION)
    tap.call(request)
    request.bottom = 9
    assert tap.exchanges[0].request.bottom == 0
    assert tap.sent_bytes > 0 < tap.received_bytes
    with pytest.raises(ProtocolError, match="does not answer Begin"):
        tap.call(pb.Begin(round=1, participants=["a"]))
    assert tap.exchanges[1].response is None


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_answers_are_followed_through_beams_and_rejected_drafts(
    attacked_model: Path, tmp_path: Path, settings: dict[str, int]
) -> None:
    recipe = make_recipe(attacked_model)
    service = TrunkService(recipe, RoleDirectory(tmp_path))
    with tapped_silo(Target(recipe), "a", service) as (silo, tap):
        prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
        ids_BL = silo.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LONG,
            min_new_tokens=LONG,
            do_sample=False,
            **settings,
        )
        h_LD = silo.model.bottom.hidden(input_ids=ids_BL[:, :-1], use_cache=False)[0].detach()
        seen = crossings_of("a", tap.exchanges)
        sent = sum(one.request.hidden.rows for one in tap.exchanges if one.kind is pb.Decode)
    service.stop()
    closest = min(float((one.hidden_LD - h_LD).abs().max()) for one in seen if one.length == len(h_LD))
    assert closest < 1e-5
    assert all(one.kind == "inference" for one in seen)
    if not settings.get("num_beams"):
        assert sum(one.length + (0 if one.forgotten_LD is None else len(one.forgotten_LD)) for one in seen) == sent


def test_answers_captured_from_a_recipe(attacked_model: Path) -> None:
    captured = capture_answers(Target(make_recipe(attacked_model)), "a", random_rows(2, 4))
    assert [one.length for one in captured.crossings] == [len(row) for row in captured.truth]


def test_pairs_are_drawn_afresh_and_belong_to_their_rows(attacked: Attacked) -> None:
    view, _ = attacked(noise=0.1, own=5, draws=2)
    first, second = view.pairs[:5], view.pairs[5:]
    assert [one.tokens for one in first] == [one.tokens for one in second]
    assert all(len(one.tokens) == one.crossing.length for one in view.pairs)
    assert all(
        not torch.equal(one.crossing.hidden_LD, two.crossing.hidden_LD) for one, two in zip(first, second, strict=True)
    )


def test_the_aggregator_sees_the_silos_update(two_silos: Target) -> None:
    (one,) = capture_round(two_silos, "a")
    assert (one.sender, one.round) == ("a", 1)
    assert one.weight > 0
    assert max(float(tensor.abs().max()) for tensor in one.tensors.values()) > 0
    view = aggregator_view(two_silos.recipe, Path("model"), (one,), {})
    with pytest.raises(AttackError, match="'aggregator' sees no crossings"):
        view.needs("updates", "crossings")
    assert observed_updates("a", []) == ()


def test_a_view_knows_no_silos_files(two_silos: Target) -> None:
    view = outsider_view(two_silos.recipe, Path("model"), {}, {})
    assert [(silo.name, silo.train, silo.held_out) for silo in view.recipe.silo] == [("a", (), None), ("b", (), None)]
    assert {one.name for one in fields(View)} == {
        "adversary",
        "recipe",
        "folder",
        "crossings",
        "pairs",
        "training_pairs",
        "candidates",
        "reference_rows",
        "updates",
        "adapters",
        "trunk_adapter",
        "steering",
        "hijacking",
    }


def test_capturing_rows_takes_all_of_them_in_order(attacked_model: Path) -> None:
    source, rows = Target(make_recipe(attacked_model)), random_rows(19, 5)
    captured = capture_rows(source, "a", rows)
    pairs = capture_pairs(source, "a", rows)
    assert all(
        torch.allclose(one.hidden_LD, two.crossing.hidden_LD, atol=1e-5)
        for one, two in zip(captured.crossings, pairs, strict=True)
    )
