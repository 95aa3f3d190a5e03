"""Steered adapters make one vector tell an attribute; in a short reach, or of a frozen bottom, it tells no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.attacks.catalogue import ATTACKS
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.steering import Attribute, AttributeReader, halving_attribute, steer
from isthmus.attacks.view.view import Crossing
from isthmus.errors import AttackError, ProtocolError
from tests.unit.attacks.steered import accuracies, knowledge_of, scenario


def test_the_attribute_is_of_half_of_the_rows() -> None:
    rows = [(1, 5, 9), (1, 5, 8), (1, 6, 9), (1, 7, 5), (1, 6, 8), (1, 8, 6)]
    attribute = halving_attribute(rows)
    assert 1 not in attribute.tokens, "it is in all rows"
    assert sum(map(attribute.of, rows)) == 3


def test_the_last_token_does_not_count() -> None:
    attribute = Attribute(frozenset({5}))
    assert [attribute.of(row) for row in ((5, 1), (1, 5), (5,), (2, 5, 1))] == [True, False, False, True]


def test_a_reader_reads_the_last_vector_alone() -> None:
    reader = AttributeReader(2, 1.0)
    reader.weight_D.data = torch.tensor([1.0, 0.0])
    crossings = [Crossing("a", "train", 1, torch.tensor([[-5.0, 0.0], [one, 9.0]])) for one in (1.0, -1.0)]
    assert reader.read(crossings) == [True, False]


def test_one_steered_vector_tells_what_an_unsteered_one_does_not(attacked_model: Path, tmp_path: Path) -> None:
    made = scenario(attacked_model, tmp_path, "steering")
    found = accuracies(made, steer(knowledge_of(made, "root+trunk")))
    assert found["steered"] > 0.85
    assert found["unsteered"] < 0.75


def test_within_a_reach_the_adapters_stay(attacked_model: Path, tmp_path: Path) -> None:
    made = scenario(attacked_model, tmp_path, "steering", federation={"max_change": 0.05})
    knowledge = knowledge_of(made, "root+trunk")
    assert knowledge.view.steering is not None
    assert knowledge.view.steering.reach == pytest.approx(0.2), "four rounds"
    guesses = steer(knowledge)  # the victim accepts them
    assert guesses.notes == ("adapters moved by 0.2 of 0.2 that the silo accepts",)
    assert accuracies(made, guesses)["steered"] < 0.75
    published = knowledge.view.steering.adapters
    with pytest.raises(ProtocolError, match="max_change"):
        knowledge.view.steering.give({name: one + 0.1 for name, one in published.items()})


def test_of_a_frozen_bottom_nothing_more_is_read(attacked_model: Path, tmp_path: Path) -> None:
    made = scenario(attacked_model, tmp_path, "steering", lora={"freeze_bottom": True})
    guesses = steer(knowledge_of(made, "root+trunk"))
    assert guesses.by["steered"] == guesses.by["unsteered"]
    assert guesses.notes == ("adapters moved by 0 without a bound",)


def test_it_is_repeated_exactly(attacked_model: Path, tmp_path: Path) -> None:
    made = scenario(attacked_model, tmp_path, "steering", rows=20, own=60)
    knowledge = knowledge_of(made, "root+trunk")
    assert steer(knowledge) == steer(Knowledge(knowledge.view))


def test_it_takes_a_root_that_lies(attacked_model: Path, tmp_path: Path) -> None:
    made = scenario(attacked_model, tmp_path, "steering", rows=4, own=8)
    with pytest.raises(AttackError, match="'trunk' sees no steering"):
        ATTACKS["steering"](knowledge_of(made, "trunk"))
    with pytest.raises(AttackError, match="sees no pairs"):
        steer(Knowledge(replace(made.view("root+trunk"), pairs=())))
