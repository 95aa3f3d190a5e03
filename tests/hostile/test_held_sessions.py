"""One silo that holds all sessions and keeps them in use: others get their share of sessions and bytes at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.errors import UnknownSessionError
from isthmus.trunk import sessions
from tests.conftest import make_recipe, save_tiny_model
from tests.unit.trunk.talk import BYTES, ONE, WAIT, Trunk, decoded, prompt

HELD = 64
SHARE = HELD // 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions have no time of their own."""
    monkeypatch.setattr(sessions, "EVICTION_GRACE", 0.0)


@pytest.fixture
def trunk(model: Path, tmp_path: Path) -> Iterator[Trunk]:
    made = trunk_of(model, tmp_path)
    yield made
    made.service.stop()


def trunk_of(model: Path, folder: Path, **section: float) -> Trunk:
    return Trunk(make_recipe(model, silos=("good", "greedy"), trunk={"sessions": HELD, **section}), folder)


def owners(trunk: Trunk) -> list[str]:
    return [silo for silo, _ in trunk.service._sessions._sessions]


def test_a_silo_gets_its_share_though_another_keeps_all_sessions_in_use(trunk: Trunk, soon: None) -> None:
    good, greedy = trunk.silo("good"), trunk.silo("greedy")
    for number in range(HELD):
        decoded(greedy.send(number, 0, prompt(2)))
    assert owners(trunk).count("greedy") == HELD, "what nobody else needs may be used"
    with trunk.held():
        kept = [greedy.send(number, 1, ONE) for number in range(HELD)]
        mine = [good.send(number, 0, prompt(3)) for number in range(SHARE)]
    for answer in mine:
        decoded(answer)
    assert max(trunk.answered[answer] for answer in mine) <= HELD + 2, "after one pass of the other silo at most"
    lost = [answer for answer in kept if isinstance(answer.exception(WAIT), UnknownSessionError)]
    assert len(lost) <= SHARE
    assert (owners(trunk).count("good"), owners(trunk).count("greedy")) == (SHARE, SHARE)


def test_a_silo_that_holds_too_much_takes_nothing_from_others(trunk: Trunk) -> None:
    good, greedy = trunk.silo("good"), trunk.silo("greedy")
    for number in range(SHARE):
        decoded(good.send(number, 0, prompt(2)))
    waiting = [greedy.send(number, 0, prompt(2)) for number in range(2 * HELD)]
    for number in range(SHARE):
        decoded(good.send(number, 1, ONE))
    assert owners(trunk).count("good") == SHARE
    assert sum(answer.done() for answer in waiting) <= SHARE


def test_unfinished_steps_do_not_hold_a_session_against_a_share(model: Path, tmp_path: Path, soon: None) -> None:
    trunk = trunk_of(model, tmp_path, sessions=4, chunk=16)
    good, greedy = trunk.silo("good"), trunk.silo("greedy")
    with trunk.held():
        long = [greedy.send(number, 0, prompt(400)) for number in range(4)]
        mine = good.send(0, 0, prompt(1))
    decoded(mine)
    assert trunk.answered[mine] <= 2
    errors = [answer.exception(WAIT) for answer in long]
    assert sum(isinstance(error, UnknownSessionError) for error in errors) == 1
    trunk.service.stop()


def test_bytes_are_bounded_and_free_again_when_leases_end(model: Path, tmp_path: Path) -> None:
    trunk = trunk_of(model, tmp_path, lease=1.0)
    greedy = trunk.silo("greedy")
    for number in range(HELD):
        decoded(greedy.send(number, 0, prompt(40)))
    assert 0 < trunk.service._sessions.nbytes <= HELD * 64 * BYTES
    deadline = time.monotonic() + WAIT
    while len(trunk.service._sessions) and time.monotonic() < deadline:
        time.sleep(0.05)  # and no request comes
    assert len(trunk.service._sessions) == trunk.service._sessions.nbytes == 0
    decoded(trunk.silo("good").send(1, 0, prompt(2)))
    trunk.service.stop()


def test_another_process_of_the_silo_finds_all_its_sessions_free(trunk: Trunk) -> None:
    greedy = trunk.silo("greedy")
    for number in range(HELD):
        decoded(greedy.send(number, 0, prompt(2)))
    decoded(trunk.silo("greedy").send(1, 0, prompt(2)))
    assert owners(trunk) == ["greedy"]
