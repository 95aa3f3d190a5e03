"""Whoever forgets, restarts or has no room: what was released once goes again as it was, and is not charged again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus import errors
from isthmus.data.tokens import collate
from isthmus.privacy.events import Release
from isthmus.wire import isthmus_pb2 as pb
from tests.unit.silo.parties import EPOCHS, MATRIX, ROWS, TOKENS, Start


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
    batch = collate(ROWS, 0)
    outbound = party.silo.model.outbound(batch.input_ids, batch.places(), batch.supervision())
    assert [len(one.h_LW) for one in outbound.fresh] == TOKENS
    released = [party.trunk._release_example(one, 1) for one in outbound.fresh]
    party.start_silo()
    party.forget()
    party.logits()
    assert party.kept() == released
    assert (party.charged(), party.ran) == ([], [])


def test_what_the_silos_own_disk_lost_is_named_then_released_anew(start: Start) -> None:
    party = start()
    party.logits()
    shutil.rmtree(party.folder / "trunk" / "kept")
    number = party.kept()[0].example
    (party.folder / "silo" / "released" / f"{number:016x}").unlink()
    with pytest.raises(errors.RunError, match="is missing from") as caught:
        party.logits()
    assert "charges its privacy budget again" in caught.value.remedy
    party.start_silo()
    party.forget()
    party.logits()
    assert party.charged() == [TOKENS[0]]


class Refusing:
    """A ledger that takes nothing."""

    def record(self, release: Release) -> None:
        raise errors.DiskFullError("no room", remedy="make some")

    def history(self) -> Iterator[Release]:
        return iter(())

    def close(self) -> None: ...


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
