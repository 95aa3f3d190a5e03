"""Decodes of one token without end: what the trunk keeps of them is bounded while they wait, and nothing is left."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.errors import FrameError, ProtocolError
from isthmus.trunk.decoding import SessionStep
from isthmus.trunk.packed_attention import SequenceCache
from isthmus.trunk.scheduler import QUEUED_JOBS, Job
from isthmus.trunk.sessions import Session
from tests.conftest import make_recipe, save_tiny_model
from tests.unit.trunk.talk import ONE, WAIT, Trunk, decoded, prompt, tokens

FLOOD = 5000
SESSIONS = 8
ROWS = 500
KINDS = (Job, SessionStep, Session, SequenceCache)


@pytest.fixture
def trunk(tmp_path: Path) -> Iterator[Trunk]:
    model = save_tiny_model("llama", tmp_path / "model")
    section = {"sessions": SESSIONS, "session_bytes": 2**20}
    made = Trunk(make_recipe(model, silos=("good", "greedy"), trunk=section), tmp_path / "run")
    yield made
    made.service.stop()


def alive(*kinds: type) -> int:
    gc.collect()
    return sum(type(one) in kinds for one in gc.get_objects())


def test_sessions_without_end_wait_in_a_bounded_queue(trunk: Trunk) -> None:
    good, greedy = trunk.silo("good"), trunk.silo("greedy")
    before, others = alive(*KINDS), alive(Session)
    answers = [greedy.send(number, 0, ONE) for number in range(FLOOD)]
    trunk.service._scheduler.submit(lambda: None).result(WAIT)
    assert trunk.service._scheduler.waiting["greedy"] <= QUEUED_JOBS
    assert alive(Job, SessionStep) - before <= 2 * QUEUED_JOBS + 10
    assert alive(Session) - others <= SESSIONS + 2, "of those that wait, one alone is begun"
    refused = [error for answer in answers if answer.done() and (error := answer.exception()) is not None]
    assert len(refused) >= FLOOD - QUEUED_JOBS - SESSIONS
    assert all(isinstance(error, ProtocolError) and "requests of greedy" in error.message for error in refused)
    decoded(good.send(1, 0, prompt(3)))
    trunk.silo("greedy")  # its process is replaced
    trunk.service._scheduler.submit(lambda: None).result(WAIT)
    answers.clear()
    good.close(1)
    assert not trunk.service._scheduler.waiting
    assert alive(*KINDS) <= before + 2


def test_one_session_without_end_leaves_nothing_either(trunk: Trunk) -> None:
    greedy = trunk.silo("greedy")
    decoded(greedy.send(1, 0, prompt(2)))
    decoded(greedy.send(1, 1, ONE))
    held, before = trunk.service._sessions.nbytes, alive(*KINDS)
    for number in range(2, FLOOD // 5):
        decoded(greedy.send(1, number, tokens(1, forget=1)))
    assert trunk.service._sessions.nbytes == held
    assert alive(*KINDS) <= before + 2  # the last step, and its job, may not have been let go of yet


def test_a_frame_of_more_rows_than_fit_is_refused_before_anything_is_made_of_it(trunk: Trunk) -> None:
    greedy = trunk.silo("greedy")
    made: list[object] = []
    new = trunk.service._runner.new_cache
    trunk.service._runner.new_cache = lambda entry: (made.append(0), new(entry))[1]  # type: ignore[method-assign]
    with pytest.raises(FrameError, match=r"trunk\.session_bytes"):
        decoded(greedy.send(1, 0, prompt(*[1] * ROWS)))
    assert len(made) == 1
    decoded(greedy.send(1, 0, prompt(1, 1)))
