"""Identification: the right candidate comes first, none of another length at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.attacks.inversion.identification import identify_rows
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import TokenRow
from isthmus.errors import AttackError
from tests.unit.attacks.attacked import Attacked, random_rows


def test_the_right_candidate_is_named(attacked: Attacked) -> None:
    view, truth = attacked(noise=0.02)
    rows = [*random_rows(8, 1), *random_rows(30, 9)]
    candidates = tuple(TokenRow(tuple(row.prompt), tuple(row.answer)) for row in rows)
    ranks = identify_rows(Knowledge(replace(view, candidates=candidates))).by_row
    assert [row[0] for row in ranks] == list(range(8))
    for ranked, row in zip(ranks, truth, strict=True):
        assert all(len(rows[number].input) == len(row) for number in ranked)


def test_without_candidates_nobody_can_be_named(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    with pytest.raises(AttackError, match="candidates"):
        identify_rows(Knowledge(view))
