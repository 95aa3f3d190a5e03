"""The judge: scores of each kind of result, beside what a blind guess has; templates are no recovered text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.attacks.recovered import AttributeGuesses, CandidateRanks, LabelGuesses, MembershipScores, RecoveredTokens
from isthmus.attacks.score import share
from isthmus.audit.judge import AttackResult, Judge
from isthmus.data.tokens import Tokens

ROWS = [Tokens([4, 20, 9], [1]), Tokens([4, 21, 22, 9], [1]), Tokens([4, 23, 9], [3])]


def judge(**more: Any) -> Judge:
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), eos_token_id=2)
    scenario: Any = SimpleNamespace(
        victim="a",
        rows=ROWS,
        captured=SimpleNamespace(truth=tuple(tuple(row.input) for row in ROWS)),
        tokenizer=tokenizer,
        choices=[(1,), (3,)],
        task_accuracy=share([True, False]),
        membership_rows=(ROWS[:2], ROWS[2:]),
        candidates=[*reversed(ROWS)],
        **more,
    )
    return Judge(scenario, inference=False)


def by_part(found: list[AttackResult]) -> dict[str, AttackResult]:
    return {one.tokens: one for one in found}


def results(recovered: Any) -> dict[str, AttackResult]:
    return by_part(judge().results("trunk", "x", recovered, 1.26, 5))


def test_tokens_are_scored_whole_and_without_the_template() -> None:
    template_only = [[4, 0, 9], [4, 0, 0, 9], [4, 0, 9]]
    found = results(RecoveredTokens(template_only))
    whole, text = found["all"], found["text"]
    assert (whole.adversary, whole.victim, whole.rows, whole.own_rows, whole.seconds) == ("trunk", "a", 3, 5, 1.3)
    tokens = {part: next(iter(one.figures.values())).value for part, one in (("all", whole), ("text", text))}
    assert tokens["all"] > 0.5
    assert tokens["text"] == 0.0


def test_labels_stand_beside_the_majority_and_clusters_are_named() -> None:
    found = results(LabelGuesses({"choices": [0, 0, 1], "clusters": [1, 1, 0]}, frozenset({"clusters"})))
    assert found["choices"].figures["accuracy"].value == 1.0
    assert found["clusters"].figures["accuracy"].value == 1.0
    assert found["strongest"].figures["majority"].value == pytest.approx(2 / 3)


def test_members_are_told_by_their_scores() -> None:
    found = results(MembershipScores({"loss": [2.0, 3.0, 1.0], "other": [0.0, 0.0, 9.0]}))
    assert found["strongest"].figures["auc"].value == found["loss"].figures["auc"].value == 1.0
    assert found["other"].figures["auc"].value == 0.0


def test_identified_rows_stand_beside_chance() -> None:
    figures = results(CandidateRanks([[2], [1], [1, 0]]))["candidates"].figures
    assert figures["top1"].value == pytest.approx(2 / 3)
    assert figures["top10"].value == 1.0
    assert figures["chance"].value == pytest.approx(1 / 3)


def test_a_result_of_too_few_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        results(CandidateRanks([[2]]))


def test_attributes_stand_beside_what_most_rows_are() -> None:
    found = results(
        AttributeGuesses({"steered": [True, True, False], "unsteered": [False] * 3}, frozenset({20, 21, 9}))
    )
    assert found["steered"].figures["accuracy"].value == 1.0
    assert found["unsteered"].figures["accuracy"].value == pytest.approx(1 / 3)
    assert found["unsteered"].figures["chance"].value == pytest.approx(2 / 3)
