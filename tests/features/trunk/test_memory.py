"""The memory of sessions: never more than there is, and who makes room for whom."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from isthmus.errors import FrameError, UnknownSessionError
from isthmus.recipe import Recipe
from isthmus.trunk import sessions
from isthmus.trunk.service import TrunkService
from tests.conftest import Split, make_recipe
from tests.oracle.twins import prompts
from tests.unit.trunk.talk import (
    BYTES,
    ONE,
    SOON,
    WAIT,
    Build,
    Story,
    alone,
    assert_equal,
    decoded,
    prompt,
    tokens,
)


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions rest soon."""
    monkeypatch.setattr(sessions, "EVICTION_GRACE", SOON)


def test_memory_never_exceeds_the_budget(build: Build, grace: None) -> None:
    """Prompts that come together, growth, and beams that multiply a row; sessions end, and others take their room."""
    budget = 700 * BYTES
    trunk = build(session_bytes=budget, chunk=16)
    silos = [trunk.silo(name) for name in "abc"]
    stories = [[prompt(150), ONE], [prompt(100, 100), tokens(1, 1)], [prompt(60), tokens(1, 1, 1, rows=(0, 0, 0))]]
    stories += [[prompt(200), tokens(60)], [prompt(60), tokens(10), tokens(70)], [prompt(33)]]
    expected = [alone(build(), number, story) for number, story in enumerate(stories)]

    def tell(number: int) -> None:
        silo = silos[number % 3]
        while True:
            answers = silo.tell(number, stories[number])
            with suppress(UnknownSessionError):  # another silo needed its share: replayed
                assert_equal(answers, expected[number])
                break
        silo.close(number)

    with ThreadPoolExecutor(len(stories)) as threads:
        list(threads.map(tell, range(len(stories)), timeout=WAIT))
    assert 256 * BYTES < trunk.most_bytes <= budget


def test_a_newer_session_waits_while_older_ones_are_active(build: Build, grace: None) -> None:
    trunk = build(session_bytes=200 * BYTES)
    a, b = trunk.silo("a"), trunk.silo("b")
    decoded(a.send(1, 0, prompt(100)))
    waiting = b.send(1, 0, prompt(100))
    for number in range(1, 8):  # longer than sessions rest
        decoded(a.send(1, number, ONE))
        threading.Event().wait(SOON / 4)
        assert not waiting.done()
    assert_equal([waiting], alone(build(), 1, [prompt(100)]))  # once the older one rests
    assert list(trunk.service._sessions._sessions) == [("b", 1)]


def test_a_waiting_session_goes_on_at_once_when_another_is_closed(build: Build) -> None:
    trunk = build(session_bytes=200 * BYTES)
    a, b = trunk.silo("a"), trunk.silo("b")
    decoded(a.send(1, 0, prompt(100)))
    waiting = b.send(1, 0, prompt(100))
    a.close(1)
    assert waiting.result(sessions.EVICTION_GRACE / 2)


def test_nobody_is_evicted_for_a_session_that_would_not_fit_then_either(build: Build, grace: None) -> None:
    trunk = build(session_bytes=300 * BYTES)
    a, b = trunk.silo("a"), trunk.silo("b")
    for session in (1, 2):
        decoded(a.send(session, 0, prompt(60)))
    decoded(b.send(1, 0, prompt(60)))
    threading.Event().wait(SOON * 1.5)
    waiting = []
    for number in range(1, 6):  # b's first session stays active: there is no room for 250 positions beside it
        decoded(b.send(1, number, ONE))
        waiting = waiting or [b.send(2, 0, prompt(250))]
        assert len(trunk.service._sessions) == 3
        threading.Event().wait(SOON / 4)
    b.close(1)
    decoded(waiting[0])
    assert list(trunk.service._sessions._sessions) == [("b", 2)]


@pytest.mark.parametrize(
    "story", [[prompt(300)], [prompt(100), tokens(150)], [prompt(60), tokens(*[1] * 5, rows=[0] * 5)]]
)
def test_a_session_that_cannot_fit_alone_is_refused(build: Build, story: Story) -> None:
    trunk = build(session_bytes=255 * BYTES)
    a, b = trunk.silo("a"), trunk.silo("b")
    decoded(b.send(1, 0, prompt(60)))
    with pytest.raises(FrameError, match=r"trunk\.session_bytes") as caught:
        [answer.result(WAIT) for answer in a.tell(1, story)]
    assert "raise trunk.session_bytes" in caught.value.remedy
    decoded(b.send(1, 1, ONE))  # nobody had to make room for it
    assert list(trunk.service._sessions._sessions) == [("b", 1)]


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (300, {"do_sample": False}),
    "beams": (800, {"do_sample": False, "num_beams": 3}),
    "prompt-lookup": (100, {"do_sample": False, "prompt_lookup_num_tokens": 3}),
}
"""Ways to generate, and positions that are enough for one silo and not for two."""


class Pausing(StoppingCriteria):
    """Never stops; a silo that thinks now and then for longer than sessions are spared."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls in (3, 7):
            threading.Event().wait(SOON)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("limit", ["session_bytes", "sessions"])
@pytest.mark.parametrize("way", WAYS)
def test_generating_with_little_room_gives_the_same_tokens(
    way: str, limit: str, split: Split, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three silos with room for one: they make room for one another, and replay."""
    monkeypatch.setattr(sessions, "EVICTION_GRACE", SOON / 4)
    positions, settings = WAYS[way]
    inputs = prompts((30,)) if way == "prompt-lookup" else prompts((9, 60))
    tight = make_recipe(model, silos=("a", "b", "c"), trunk={limit: 1 if limit == "sessions" else positions * BYTES})

    def generate(recipe: Recipe, name: str) -> torch.Tensor:
        pausing = StoppingCriteriaList([Pausing()])
        how = {"min_new_tokens": 24, "max_new_tokens": 24, "stopping_criteria": pausing, **settings}
        return split(recipe, name)[0].generate(**inputs, **how)

    expected = generate(make_recipe(model), "a")
    opened = count_new(split(tight)[1], monkeypatch)
    with ThreadPoolExecutor(3) as threads:
        for got in threads.map(lambda name: generate(tight, name), "abc", timeout=WAIT):
            assert torch.equal(got, expected)
    assert len(opened) > 3


def count_new(service: TrunkService, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every session that is opened."""
    opened: list[object] = []
    new = service._sessions._new
    monkeypatch.setattr(service._sessions, "_new", lambda *what: (opened.append(what), new(*what))[1])
    return opened
