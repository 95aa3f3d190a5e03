"""The noises of the cuts' benchmark: as published, and in the published proportion to the states' magnitude."""

from __future__ import annotations

import pytest

from benchmarks.privacy.cuts import NOISES, PUBLISHED_MAGNITUDE, noises


def test_each_noise_is_given_as_published_and_in_proportion() -> None:
    found = dict(noises(1.2))
    assert list(found.values())[: len(NOISES)] == list(NOISES)
    assert found["noise 2.5 × mean magnitude"] == pytest.approx(3.0)
    assert len(found) == 2 * len(NOISES) - 1


def test_at_the_published_magnitude_both_are_the_same() -> None:
    found = [noise for _, noise in noises(PUBLISHED_MAGNITUDE)]
    assert found[len(NOISES) :] == pytest.approx(found[1 : len(NOISES)])
