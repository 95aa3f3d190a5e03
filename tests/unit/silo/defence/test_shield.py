"""The shield: averts what its records call sensitive, at the places where the tokens are, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isthmus.silo.defence import shield
from isthmus.silo.defence.shield import Shield

AVERSIONS = torch.tensor([0.0, 3.0])
"""Of plain tokens, and of sensitive ones."""


class Records:
    """Tokens from 50 on are sensitive."""

    def __init__(self, *, sensitive: bool = True) -> None:
        self.sensitivity = SimpleNamespace(aversions=AVERSIONS) if sensitive else None

    def classes(self, rows: list[list[int]]) -> list[list[int]]:
        return [[int(token >= 50) for token in row] for row in rows]


class Bottom:
    def hidden(self, **inputs: Any) -> str:
        return "plain"


@pytest.fixture
def averted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What bottom was told to turn away from."""
    seen: list[torch.Tensor] = []

    def hidden(part: Any, a_BP: torch.Tensor, **inputs: Any) -> str:
        seen.append(a_BP)
        return "averted"

    monkeypatch.setattr(shield, "averted_hidden", hidden)
    return seen


def run(records: Records, ids: list[list[int]], session: Any = None, **inputs: Any) -> Any:
    shielded = Shield(records, 2.0)  # type: ignore[arg-type]
    return shielded.hidden(Bottom(), session, input_ids=torch.tensor(ids), **inputs)  # type: ignore[arg-type]


def test_sensitive_tokens_are_averted_where_they_stand(averted: list[torch.Tensor]) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert run(Records(), [[0, 60, 5], [5, 5, 70]], attention_mask=mask) == "averted"
    assert averted[0].tolist() == [[0.0, 6.0, 0.0], [0.0, 0.0, 6.0]]


def test_with_a_cache_the_earlier_tokens_are_averted_too(averted: list[torch.Tensor]) -> None:
    cache = SimpleNamespace(get_seq_length=lambda: 2)
    session = SimpleNamespace(read_tokens=lambda rows: [[1, 0, *Records().classes(rows)[0]]])
    run(Records(), [[60]], session, past_key_values=cache)
    assert averted[0].tolist() == [[6.0, 0.0, 6.0]]


def test_without_sensitivity_or_tokens_bottom_runs_plainly(averted: list[torch.Tensor]) -> None:
    assert run(Records(sensitive=False), [[60]]) == "plain"
    plain = Shield(Records(), 2.0).hidden(Bottom(), inputs_embeds=torch.zeros(1, 1, 4))  # type: ignore[arg-type]
    assert plain == "plain"  # type: ignore[comparison-overlap]
    assert run(Records(), [[60]], SimpleNamespace(read_tokens=lambda rows: None)) == "plain"
    assert not averted


def test_classes_for_another_number_of_rows_are_refused(averted: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="zip"):
        run(Records(), [[60]], SimpleNamespace(read_tokens=lambda rows: []))
