"""What counts as a service that says how it is."""

from __future__ import annotations

from isthmus.wire.vitals import Vitals, Watched


class Telling:
    def vitals(self) -> Vitals:
        return Vitals("idle", 0)


def test_a_service_is_watched_if_it_tells() -> None:
    assert isinstance(Telling(), Watched)
    assert not isinstance(object(), Watched)


def test_a_service_is_well_and_waits_for_nobody_by_default() -> None:
    told = Vitals("idle", 0)
    assert not told.failure
    assert not told.missing
    assert not told.gauges
