"""The round that a trunk serves: a successor with another one is refused, until the silo trains."""

from __future__ import annotations

import pytest

from isthmus.errors import RunError
from isthmus.silo.served import ServedRound, require_finished, same_run
from isthmus.wire import isthmus_pb2 as pb

SERVED = pb.Welcome(completed=2, run="r")


@pytest.mark.parametrize(
    ("welcome", "told"),
    [
        (pb.Welcome(completed=3, run="r"), "it serves round 3, the silo has round 2"),
        (pb.Welcome(completed=2, run="s"), "round 2 of another run"),
        (pb.Welcome(completed=2, run="r", training=True), "the trunk trains"),
    ],
)
def test_another_round_is_refused_once_one_is_set(welcome: pb.Welcome, told: str) -> None:
    served = ServedRound()
    served.check(welcome)
    served.set(SERVED)
    served.check(SERVED)
    with pytest.raises(RunError, match=told) as refused:
        served.check(welcome)
    assert refused.value.remedy
    served.release()
    served.check(welcome)


def test_within_a_round_an_adapter_is_of_none() -> None:
    require_finished(SERVED)
    with pytest.raises(RunError, match="no longer that of round 4"):
        require_finished(pb.Welcome(completed=4, training=True))


def test_a_run_without_a_name_may_be_any() -> None:
    assert same_run("", "r")
    assert same_run("r", "")
    assert same_run("r", "r")
    assert not same_run("r", "s")
