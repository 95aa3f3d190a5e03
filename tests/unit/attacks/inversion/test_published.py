"""The published decoder: a token at every vector, and refused where not all tokens cross at full width."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.attacks.inversion.published import PublishedSettings, run_published_decoder
from isthmus.attacks.knowledge import Knowledge
from isthmus.errors import AttackError
from tests.unit.attacks.attacked import Attacked


@pytest.mark.parametrize("mended", [False, True])
def test_a_token_is_found_at_every_vector(attacked: Attacked, mended: bool) -> None:
    view, truth = attacked(own=10)
    found = run_published_decoder(Knowledge(view), PublishedSettings(steps=2, mended=mended))
    assert [len(row) for row in found] == [len(row) for row in truth]


@pytest.mark.parametrize("boundary", [{"width": 4}, {"tail": 1}])
def test_a_narrow_or_short_crossing_is_refused(attacked: Attacked, boundary: dict[str, int]) -> None:
    view, _ = attacked(own=10, **boundary)
    with pytest.raises(AttackError, match="model's width"):
        run_published_decoder(Knowledge(view), PublishedSettings(steps=1))


def test_without_own_rows_it_is_refused(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    with pytest.raises(AttackError, match="pairs"):
        run_published_decoder(Knowledge(replace(view, pairs=())))
