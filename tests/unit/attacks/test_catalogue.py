"""The catalogue: every attack by one name, the default ones among them, and tokens for every sequence in the view."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.attacks.catalogue import ATTACKS, DEFAULT_ATTACKS, INVERSIONS, invert_linearly
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import RecoveredTokens
from isthmus.errors import AttackError
from tests.unit.attacks.attacked import Attacked


def test_names_are_those_of_attacks() -> None:
    assert set(DEFAULT_ATTACKS) <= set(INVERSIONS) < set(ATTACKS)


def test_the_linear_inversion_reads_clean_vectors(attacked: Attacked) -> None:
    view, truth = attacked(own=200)
    recovered = ATTACKS["linear"](Knowledge(view))
    assert isinstance(recovered, RecoveredTokens)
    assert [len(row) for row in recovered.ids] == [len(row) for row in truth]
    right = [
        one == two for row, own in zip(recovered.ids, truth, strict=True) for one, two in zip(row, own, strict=True)
    ]
    assert sum(right) > 0.2 * len(right), "by chance it would be one of a hundred"


def test_without_rows_of_its_own_it_is_refused(attacked: Attacked) -> None:
    view, _ = attacked()
    with pytest.raises(AttackError, match="pairs"):
        invert_linearly(Knowledge(replace(view, pairs=())))
