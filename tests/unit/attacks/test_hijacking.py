"""A trunk that returns gradients of its own has the victim's vectors tell more; a frozen bottom does not move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.attacks.catalogue import ATTACKS
from isthmus.attacks.hijacking import Hijacker, hijack
from isthmus.attacks.steering import halving_attribute
from isthmus.errors import AttackError
from isthmus.model import adapters
from tests.unit.attacks.steered import WIDE, accuracies, hijacked, knowledge_of, scenario


def test_hijacked_vectors_tell_more_than_others(attacked_model: Path, tmp_path: Path) -> None:
    made = hijacked(attacked_model, tmp_path)
    guesses = hijack(knowledge_of(made, "trunk+silo"))
    assert guesses.notes == ("80 gradients returned",)
    found = accuracies(made, guesses)
    assert found["hijacked"] >= found["unhijacked"] + 0.1


def small(model: Path, place: Path, **sections: object) -> Hijacker:
    made = scenario(model, place, "hijacking", rows=4, own=40, silos=2, boundary=WIDE, **sections)
    knowledge = knowledge_of(made, "trunk+silo")
    rows = [pair.tokens for pair in knowledge.view.pairs]
    return Hijacker(knowledge, rows, halving_attribute(rows))


def test_a_lesson_is_of_each_sequences_last_vector(attacked_model: Path, tmp_path: Path) -> None:
    hijacker = small(attacked_model, tmp_path)
    returned = hijacker.teach([torch.randn(3, 32), torch.randn(1, 32)], {})
    assert [tuple(one.shape) for one in returned] == [(3, 32), (1, 32)]
    assert not returned[0][:-1].any()
    assert all(one[-1].any() for one in returned)


def test_its_bottom_has_the_adapters_of_the_round(attacked_model: Path, tmp_path: Path) -> None:
    hijacker = small(attacked_model, tmp_path)
    known = {name: torch.full_like(one, 0.25) for name, one in adapters.trainable(hijacker._bottom).items()}
    hijacker.adopt(known)
    assert all(torch.equal(one, known[name]) for name, one in adapters.trainable(hijacker._bottom).items())
    hijacker.teach([torch.randn(2, 32)], known)
    within = {name: one.detach().clone() for name, one in adapters.trainable(hijacker._bottom).items()}
    assert any(not torch.equal(one, known[name]) for name, one in within.items()), "it follows the victim's step"
    hijacker.adopt(known)  # of the same round: it stays where its own steps led
    assert all(torch.equal(one, within[name]) for name, one in adapters.trainable(hijacker._bottom).items())


def test_it_takes_a_trunk_that_knows_the_adapters(attacked_model: Path, tmp_path: Path) -> None:
    made = scenario(attacked_model, tmp_path, "hijacking", rows=4, own=8)
    with pytest.raises(AttackError, match="'trunk' sees no hijacking"):
        ATTACKS["hijacking"](knowledge_of(made, "trunk"))


def test_of_a_frozen_bottom_it_reads_what_it_read(attacked_model: Path, tmp_path: Path) -> None:
    frozen = {"lora": {"freeze_bottom": True}, "train": {"rounds": 2, "steps": 2}}
    made = scenario(attacked_model, tmp_path, "hijacking", rows=20, own=60, silos=2, boundary=WIDE, **frozen)
    guesses = hijack(knowledge_of(made, "trunk+silo"))
    assert guesses.by["hijacked"] == guesses.by["unhijacked"]
    assert guesses.notes == ("0 gradients returned",)
