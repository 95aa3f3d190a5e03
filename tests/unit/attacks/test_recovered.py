"""What attacks recover cannot be changed afterwards, and says what it does not know."""

from __future__ import annotations

import dataclasses

import pytest

from isthmus.attacks.recovered import CandidateRanks, LabelGuesses, MembershipScores, RecoveredTexts, RecoveredTokens


def test_unless_told_nothing_is_special() -> None:
    assert not RecoveredTokens([[1]]).response
    assert LabelGuesses({"a": [0]}).clusters == frozenset()
    assert RecoveredTexts([]).notes == MembershipScores({}).notes == ()


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CandidateRanks([[1]]).by_row = []  # type: ignore[misc]
