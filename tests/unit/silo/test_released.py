"""Released once: later epochs send numbers; nothing is drawn, charged or computed twice, whoever forgets or restarts."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus import errors
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.events import Release
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.report.record import RoleDirectory
from isthmus.silo.data import Batch, Tokens, collate
from isthmus.silo.join import Silo, greeting, join
from isthmus.silo.pipeline import pipelined_step
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.trainer import train_step
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model

WIDTH, EPOCHS = 32, 3
ROWS = [Tokens(list(range(4, 4 + n)), [50 + n, 60 + n]) for n in (3, 9, 5, 7)]
TOKENS = [len(row.prompt) + 2 for row in ROWS]
MATRIX = 4 * WIDTH
"""Bytes of one token's hidden states."""
HEADER, PER_ROW = 16, 10
"""Bytes of a forward by numbers: at most so many, and for each row its number and length."""


class Tap(LoopbackChannel):
    """A channel that keeps what was sent."""

    sent: list[Message]

    def submit(self, request: Message) -> Answer:
        self.__dict__.setdefault("sent", []).append(type(request).FromString(request.SerializeToString()))
        return super().submit(request)

    def take(self, kind: type[Any]) -> list[Any]:
        return [request for request in self.sent if isinstance(request, kind)]


class Party:
    """Trunk and silo on folders of their own; either can start again."""

    def __init__(self, recipe: Recipe, folder: Path, *, ledger: Any = None) -> None:
        self.recipe, self.folder, self.ledger = recipe, folder, ledger or MemoryLedger()
        self.ran: list[int] = []
        self.start_trunk()
        self.start_silo()

    def start_trunk(self) -> None:
        if hasattr(self, "service"):
            self.service.stop()
        self.service = TrunkService(self.recipe, RoleDirectory(self.folder / "trunk"))

    def start_silo(self) -> None:
        hello = greeting(Checkpoint(self.recipe.model.path), self.recipe)
        self.tap = Tap(self.service, "a", greeting=hello)
        self.silo: Silo = join(
            self.recipe, "a", ledger=self.ledger, channel=self.tap, releases=self.folder / "silo" / "released"
        )
        bottom = self.silo.model.bottom
        self.optimizer = torch.optim.SGD([p for p in self.silo.model.parameters() if p.requires_grad], lr=0.1)
        bottom.family.backbone_of(bottom.model).register_forward_hook(
            lambda *call: self.ran.append(len(call[-1].last_hidden_state))
        )

    @property
    def trunk(self) -> RemoteTrunk:
        return self.silo.trunk

    def forget(self) -> None:
        """Count from here on."""
        self.ran.clear()
        self.tap.sent = []
        getattr(self.ledger, "releases", []).clear()

    def charged(self) -> list[int]:
        """Tokens of each forward release in the ledger."""
        releases: list[Release] = self.ledger.releases
        return [release.rows for release in releases if release.path == "forward"]

    def kept(self) -> list[pb.Keep]:
        return self.tap.take(pb.Keep)

    def hidden_bytes(self) -> int:
        return sum(len(request.hidden.data) for kind in (pb.Keep, pb.Forward) for request in self.tap.take(kind))

    def epoch(self, *, micro_batches: int = 1, size: int = 2) -> list[float]:
        """Steps over all rows, without the trunk's optimizer; returns their losses."""
        return [
            train_step(self.silo.model, self.optimizer, part).loss
            if micro_batches == 1
            else pipelined_step(self.silo.model, self.optimizer, part, micro_batches).loss
            for part in batches(size)
        ]

    @torch.no_grad()
    def logits(self, rows: list[Tokens] = ROWS) -> torch.Tensor:
        return self.silo.model(**collate(rows, 0).inputs(), use_cache=False).logits


Start = Callable[..., Party]


def batches(size: int = 2) -> list[Batch]:
    return [collate(ROWS[start : start + size], 0) for start in range(0, len(ROWS), size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Start]:
    """A trunk and a silo: ``start(noise=0.1, codec="int8", kept_bytes=3000)``."""
    started: list[Party] = []

    def party(
        *, noise: float = 0.1, codec: str = "fp32", kept_bytes: int = 2**30, ledger: Any = None, **sections: Any
    ) -> Party:
        boundary = {"release_once": True, "forward": {"noise": noise}, "codec": codec}
        recipe = make_recipe(
            folder,
            lora={"freeze_bottom": True},
            boundary=boundary,
            trunk={"kept_bytes": kept_bytes},
            **{"train": {"steps": 99}, **sections},
        )
        started.append(Party(recipe, tmp_path / f"party{len(started)}", ledger=ledger))
        return started[-1]

    yield party
    for one in started:
        one.service.stop()


@pytest.mark.parametrize("codec_name", ["fp32", "int8+zstd"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_later_epochs_send_numbers_only(start: Start, micro_batches: int, codec_name: str) -> None:
    party = start(codec=codec_name)
    party.epoch(micro_batches=micro_batches)
    assert sorted(party.charged()) == sorted(TOKENS)
    assert [request.hidden.rows for request in party.kept()] == TOKENS
    assert sum(party.ran) == len(ROWS)
    for _ in range(EPOCHS - 1):
        party.forget()
        party.epoch(micro_batches=micro_batches)
        assert (party.charged(), party.hidden_bytes(), party.kept(), party.ran) == ([], 0, [], [])
        forwards = party.tap.take(pb.Forward)
        assert len(forwards) == 2 * micro_batches
        for request in forwards:
            assert not request.HasField("hidden")
            assert frames.wrap(request, id=2**20).ByteSize() <= HEADER + PER_ROW * len(request.lengths)
        assert not any(request.reply for request in party.tap.take(pb.Backward))


def test_the_backward_gets_no_bytes_back(start: Start) -> None:
    party = start()
    party.epoch()
    before = party.tap.received_bytes
    forward = party.trunk.start_rows([[5, 6, 7]])
    party.trunk.land(forward)
    party.trunk.land(party.trunk.start_backward(forward, torch.ones(3, WIDTH), reply=False))
    assert party.tap.received_bytes - before <= 3 * MATRIX + 100  # the forward's answer alone


def test_ledger_and_frames_correspond_one_to_one(start: Start) -> None:
    party = start(noise=0.07)
    party.epoch()
    on_wire = [(m.hidden.rows, m.hidden.width, len(m.hidden.data)) for m in party.kept()]
    noted = [release for release in party.ledger.releases if release.path == "forward"]
    assert [(release.rows, release.width, release.size) for release in noted] == on_wire
    assert {release.noise for release in noted} == {0.07}
    assert party.silo.boundary.released_bytes["forward"] == party.hidden_bytes()


@torch.no_grad()
def test_what_leaves_is_noised_and_without_noise_is_what_bottom_gives(start: Start) -> None:
    noised, exact = start(noise=0.1), start(noise=0.0)
    for party in (noised, exact):
        party.logits()
    drawn = []
    for row, one, other in zip(ROWS, noised.kept(), exact.kept(), strict=True):
        h_TD = exact.silo.model.bottom.hidden(input_ids=torch.tensor([row.prompt + row.answer]), use_cache=False)[0]
        sent = [codec.decode(m.hidden, rows=len(h_TD), width=WIDTH, codec="fp32") for m in (one, other)]
        assert torch.allclose(sent[1], h_TD, atol=1e-5)
        drawn.append(sent[0] - h_TD)
    assert torch.cat(drawn).std() == pytest.approx(0.1, rel=0.1)


def test_a_row_is_known_however_it_is_padded_and_wherever_it_comes(start: Start) -> None:
    party = start()
    first = party.logits([ROWS[1], ROWS[0], ROWS[0]])
    assert party.charged() == [TOKENS[1], TOKENS[0]]
    again = party.logits([ROWS[0]])
    assert len(party.kept()) == 2
    assert torch.allclose(first[1, -2:], again[0, -2:], atol=1e-4)
    assert torch.equal(first[1], first[2])


def test_other_text_is_released(start: Start) -> None:
    party = start()
    party.logits([Tokens([4, 5], [6])])
    party.logits([Tokens([4], [5, 6])])  # the same text, cut elsewhere into prompt and answer
    party.logits([Tokens([4, 5], [7])])
    party.logits([Tokens([4, 5], [6, 6])])
    assert party.charged() == [3, 3, 4]
    assert len({request.example for request in party.kept()}) == 3


def test_generation_is_as_ever(start: Start) -> None:
    party = start()
    ids = torch.tensor([ROWS[0].prompt])
    for _ in range(2):
        party.forget()
        party.silo.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert party.charged() == [3, 1, 1]
        assert len(party.tap.take(pb.Decode)) == 3
        assert not party.kept()


def test_all_micro_batches_are_sent_before_the_first_answer_is_needed(start: Start) -> None:
    party = start()
    pipelined_step(party.silo.model, party.optimizer, batches(4)[0], 2)
    kinds = [type(request).__name__ for request in party.tap.sent[1:]]
    assert kinds == ["Keep", "Keep", "Forward"] * 2 + ["Backward"] * 2


def test_a_full_share_evicts_and_the_same_bytes_go_again(start: Start) -> None:
    """Room for two rows: every batch of two finds that the one before pushed it out."""
    party, roomy = start(kept_bytes=20 * MATRIX + 80, noise=0.0), start(noise=0.0)
    expected = [roomy.epoch() for _ in range(EPOCHS)]
    for epoch in range(EPOCHS):
        party.tap.sent = []
        assert party.epoch() == expected[epoch]
        resent = {request.example: request for request in party.kept()}
        first = resent if epoch == 0 else first  # noqa: F821
        assert resent == first
        assert len(party.charged()) == sum(party.ran) == len(ROWS)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_eviction_in_the_midst_of_micro_batches(start: Start, micro_batches: int) -> None:
    """Later steps are open already when an earlier forward goes again."""
    party, roomy = start(kept_bytes=20 * MATRIX + 80, noise=0.0), start(noise=0.0)
    for _ in range(EPOCHS):
        losses = party.epoch(micro_batches=micro_batches, size=4)
        assert losses == pytest.approx(roomy.epoch(micro_batches=micro_batches, size=4), rel=1e-6)
    assert len(party.charged()) == len(ROWS)
    assert len(party.kept()) > len(ROWS)


def test_a_batch_beyond_the_share_is_named_after_one_more_try(start: Start) -> None:
    party = start(kept_bytes=20 * MATRIX + 80)
    with pytest.raises(errors.UnknownExampleError) as caught:
        party.epoch(size=4)
    assert "trunk.kept_bytes" in caught.value.remedy
    assert len(party.kept()) == 2 * len(ROWS)
    assert len(party.charged()) == len(ROWS)
    party.epoch(size=1)


def test_an_example_beyond_the_share_is_named(start: Start) -> None:
    party = start(kept_bytes=4 * MATRIX)
    with pytest.raises(errors.FrameSizeError) as caught:
        party.epoch()
    assert "trunk.kept_bytes" in caught.value.remedy


def test_the_trunk_starts_again_and_has_kept_all(start: Start) -> None:
    party = start()
    expected = party.logits()
    party.start_trunk()
    party.start_silo()
    party.forget()
    assert torch.equal(party.logits(), expected)
    assert (party.charged(), party.kept(), party.ran) == ([], [], [])


def test_a_trunk_that_lost_its_disk_gets_the_same_bytes(start: Start) -> None:
    party = start()
    expected, sent = party.logits(), party.kept()
    shutil.rmtree(party.folder / "trunk" / "kept")
    party.forget()
    assert torch.equal(party.logits(), expected)
    assert party.kept() == sent
    assert (party.charged(), party.ran) == ([], [])


def test_the_silo_starts_again_and_releases_nothing_again(start: Start) -> None:
    party = start()
    expected = party.logits()
    numbers = [request.example for request in party.kept()]
    party.start_silo()
    party.forget()
    assert torch.equal(party.logits(), expected)
    assert (party.charged(), party.kept(), party.ran) == ([], [], [])
    assert list(party.tap.take(pb.Forward)[0].examples) == numbers


def test_a_silo_that_died_before_it_could_send_sends_what_it_had_released(start: Start) -> None:
    party = start()
    rows = [row.prompt + row.answer for row in ROWS]
    released = party.trunk.released.release(rows, 1)
    party.start_silo()
    party.forget()
    party.logits()
    assert party.kept() == released
    assert (party.charged(), party.ran) == ([], [])


def test_numbers_tell_secret_text_model_and_mechanism_apart(start: Start, tmp_path: Path) -> None:
    party = start()
    row = [4, 5, 6]
    again = [party.trunk.released.number(row) for _ in range(2)]
    assert again[0] == again[1]
    secret = party.folder / "silo" / "released" / "secret"
    assert secret.stat().st_mode & 0o077 == 0
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    changed = [
        start(noise=0.2),
        start(codec="bf16"),
        start(model={"path": str(other)}),
        start(model={"bottom": 2}),
        start(model={"dtype": "bfloat16"}),
    ]
    for one in changed:
        shutil.copy(secret, one.folder / "silo" / "released" / "secret")
        one.start_silo()
    same_but_secret = start()
    numbers = [one.trunk.released.number(row) for one in (party, *changed, same_but_secret)]
    numbers += [party.trunk.released.number(text) for text in ([4, 5], [5, 4, 6], [4, 5, 6, 0], [])]
    assert len(set(numbers)) == len(numbers)
    same = start()
    shutil.copy(secret, same.folder / "silo" / "released" / "secret")
    same.start_silo()
    assert same.trunk.released.number(row) == again[0]


def test_what_the_silos_own_disk_lost_is_named_then_released_anew(start: Start) -> None:
    party = start()
    party.logits()
    shutil.rmtree(party.folder / "trunk" / "kept")
    number = party.kept()[0].example
    (party.folder / "silo" / "released" / f"{number:016x}").unlink()
    with pytest.raises(errors.RunError, match="is gone from") as caught:
        party.logits()
    assert "charged" in caught.value.remedy
    party.start_silo()
    party.forget()
    party.logits()
    assert party.charged() == [TOKENS[0]]


class Refusing:
    """A ledger that takes nothing."""

    def record(self, release: Release) -> None:
        raise errors.DiskFullError("no room", remedy="make some")


def test_a_refusing_ledger_lets_nothing_out_nor_onto_the_disk(start: Start) -> None:
    party = start(ledger=Refusing())
    with pytest.raises(errors.DiskFullError):
        party.logits()
    assert [type(request) for request in party.tap.sent] == [pb.Hello]
    assert {path.name for path in (party.folder / "silo" / "released").iterdir()} == {"secret"}


@pytest.mark.parametrize("whose", ["silo", "trunk"])
def test_a_full_disk_is_named_and_the_silo_goes_on_when_there_is_room(
    start: Start, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    party = start()
    sync, full = os.fsync, party.folder / ("silo/released" if whose == "silo" else "trunk/kept")

    def fsync(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(errors.DiskFullError):
            party.logits()
    assert bool(party.kept()) == (whose == "trunk")
    party.forget()
    party.logits()
    assert bool(party.charged()) == (whose == "silo")  # what could not be kept never left, and is charged all the same
    party.forget()
    party.logits()
    assert (party.charged(), party.hidden_bytes()) == ([], 0)


def test_a_bottom_that_trains_is_refused(start: Start) -> None:
    party = start()
    party.logits()
    party.silo.model.bottom.requires_grad_(True)
    party.forget()
    with pytest.raises(errors.ModelError, match="bottom trains") as caught:
        party.logits()
    assert "release_once" in caught.value.remedy
    assert not party.tap.sent


def test_without_a_folder_releases_last_as_long_as_the_silo(start: Start) -> None:
    party = start()
    silo = join(party.recipe, "a", channel=party.tap)
    folder = silo.trunk.released._folder
    with torch.no_grad():
        silo.model(**collate(ROWS, 0).inputs(), use_cache=False)
    assert len(list(folder.iterdir())) == len(ROWS) + 1
    del silo
    assert not folder.exists()


def test_a_trunk_restarted_without_release_once_refuses(start: Start) -> None:
    party = start()
    party.recipe = party.recipe.model_copy(
        update={"boundary": party.recipe.boundary.model_copy(update={"release_once": False})}
    )
    party.start_trunk()
    tap = Tap(party.service, "a", greeting=greeting(Checkpoint(party.recipe.model.path), party.recipe))
    with pytest.raises(errors.ProtocolError, match="keeps no examples"):
        tap.call(pb.Keep(example=1, hidden=codec.encode(torch.ones(3, WIDTH), "fp32")))
