"""Which source guesses a token: the one that lately was right more often at such a place, if asking it pays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isthmus.silo.drafting.draft import Candidates, Proposal, Sources
from isthmus.silo.drafting.draft_length import MAX_DRAFT, Costs
from isthmus.silo.drafting.lookup import Lookup

TEXT = [5, 6, 7, 8, 5, 6]
"""Looking up says 7 comes next, then 8."""


class FakeDrafter:
    """A bridge that always says the same, with the same confidence."""

    def __init__(self, token: int, *, ready: bool = True) -> None:
        self.token, self.ready, self.proposed = token, ready, 0

    def start(self, length: int) -> None: ...

    def stop(self) -> None: ...

    def propose(self, ids: list[int]) -> Proposal:
        self.proposed += 1
        return Proposal("bridge 9", self.token)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a candidate generator with a fake bridge: ``candidates(FakeDrafter(3), costs)``."""

    def build(drafter: FakeDrafter, costs: Costs, *, longest: int = 100, end: int = 1) -> Candidates:
        monkeypatch.setattr("isthmus.silo.drafting.draft.BridgeDrafter", lambda *_: drafter)
        draft: Any = SimpleNamespace(
            corpus=Lookup(),
            sources=Sources(),
            clock=lambda: 0.0,
            draft_length=SimpleNamespace(costs=costs, note_draft=lambda *_: None, note_trip=lambda *_: None),
        )
        settings = SimpleNamespace(max_length=longest, _eos_token_tensor=torch.tensor([end]))
        return Candidates(draft, None, [], settings)  # type: ignore[arg-type]

    return build


def drafted(candidates: Candidates, text: list[int] = TEXT) -> list[int]:
    ids = torch.tensor([text])
    return candidates.get_candidates(ids)[0][0, len(text) :].tolist()


FAR, NEAR = Costs(1.0, 0.001, 0.01), Costs(0.001, 0.001, 0.01)


def test_a_bridge_that_is_right_is_used(candidates: Any) -> None:
    one = candidates(FakeDrafter(3), FAR)
    assert drafted(one)[0] == 3


def test_a_bridge_that_is_wrong_is_soon_not_asked(candidates: Any) -> None:
    drafter = FakeDrafter(3)
    one = candidates(drafter, FAR)
    for _ in range(60):
        one._text, one._indexed = Lookup(), 0
        drafted(one)
        one.update_candidate_strategy(torch.tensor([[*TEXT, 7, 8, 5, 6]]), None, 0)
    drafter.proposed = 0
    one._text, one._indexed = Lookup(), 0
    assert drafted(one)[:4] == [7, 8, 5, 6]
    assert drafter.proposed == 0


def test_nothing_known_and_no_bridge_drafts_nothing(candidates: Any) -> None:
    assert drafted(candidates(FakeDrafter(3, ready=False), FAR), [5, 6, 7]) == []


def test_a_near_trunk_is_not_worth_a_draft(candidates: Any) -> None:
    drafter = FakeDrafter(3)
    assert drafted(candidates(drafter, NEAR), [5, 6, 7]) == []
    assert drafter.proposed == 0


def test_a_draft_stops_before_the_end_of_the_text(candidates: Any) -> None:
    assert drafted(candidates(FakeDrafter(3), FAR, end=3)) == []


@pytest.mark.parametrize(("longest", "due"), [(len(TEXT) + 1, 0), (len(TEXT) + 4, 3), (100, MAX_DRAFT)])
def test_a_draft_leaves_room_for_the_trunks_own_token(candidates: Any, longest: int, due: int) -> None:
    assert len(drafted(candidates(FakeDrafter(3), Costs(1e6, 0.0, 0.0), longest=longest))) == due


def test_every_source_learns_up_to_the_first_wrong_token(candidates: Any) -> None:
    one = candidates(FakeDrafter(3), Costs(1e6, 0.0, 0.0))
    sources = one._draft.sources
    assert drafted(one)[0] == 3
    tried = sources.rates["bridge 9"].tried
    looked_up = sources.rates["prompt 2"].value
    one.update_candidate_strategy(torch.tensor([[*TEXT, 7]]), None, 0)
    assert sources.rates["bridge 9"].tried == tried + 1
    assert sources.rates["prompt 2"].value > looked_up
