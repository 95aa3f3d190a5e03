"""The records: one record for all that begins with a prompt of the data, and each token's class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.tokens import Tokens
from isthmus.errors import RunError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import SensitivitySection
from isthmus.silo.records import Records

CLASSES = {"low": {"noise": 0.5}, "high": {"noise": 2.0, "epsilon": 4.0}}
LOW, HIGH = 1, 2
IDS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def words(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def register(folder: Path | None = None, **section: Any) -> Records:
    """One to which the word w9 is highly sensitive."""
    values = {"function": "tests.unit.silo.test_records:nines", "classes": CLASSES, **section}
    return Records(folder, Sensitivity(SensitivitySection.model_validate(values)), words)


def nines(text: str) -> list[tuple[int, int, str]]:
    starts = [place for place in range(len(text)) if text.startswith("w9", place)]
    return [(start, start + 2, "high") for start in starts]


@given(st.lists(st.builds(Tokens, IDS, IDS), max_size=6), IDS)
@settings(derandomize=True, deadline=None)
def test_the_longest_known_prompt_names_a_row(rows: list[Tokens], row: list[int]) -> None:
    one = Records()
    one.add_rows(rows)
    begins = [tuple(known.prompt) for known in rows if row[: len(known.prompt)] == known.prompt]
    expected = list(max(begins, key=len, default=tuple(row)))
    assert one.subjects([row], [1]).records == one.subjects([expected], [1]).records


def test_a_rows_answer_changes_no_record_and_other_text_is_another() -> None:
    one = Records()
    one.add_rows([Tokens([5, 6], [7])])
    rows = [[5, 6], [5, 6, 7], [5, 6, 8, 9], [5], [6, 5]]
    records = one.subjects(rows, [1] * 5).records
    assert len(set(records[:3])) == 1
    assert len(set(records)) == 3


def test_a_turn_is_of_its_conversations_record_unless_the_data_knows_better() -> None:
    one = Records()
    one.add_rows([Tokens([5, 6], [7]), Tokens([5, 6, 7, 8], [9])])
    assert one.same_record([1, 2], [1, 2, 3, 4])
    assert one.same_record([5, 6], [5, 6, 7, 9])
    assert not one.same_record([5, 6], [5, 6, 7, 8, 9])
    assert not one.same_record([5], [5, 6])


def test_names_stay_over_a_restart_and_need_the_key(tmp_path: Path) -> None:
    first, again, other = (Records(folder) for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"))
    name = first.subjects([[5, 6]], [2]).records
    assert again.subjects([[5, 6]], [2]).records == name
    assert other.subjects([[5, 6]], [2]).records != name
    assert (tmp_path / "a" / "record-key").stat().st_mode & 0o777 == 0o600


def test_without_sensitivity_there_are_no_factors_and_no_budgets() -> None:
    one = Records()
    one.add_rows([Tokens([5, 6], [7])])
    history = one.history(1)
    for subjects in (one.subjects([[5, 6]], [2]), one.subjects(None, [2]), history.subjects([[5]], [1])):
        assert subjects.factors_T is None
        assert subjects.budgets is None


def test_only_what_crosses_has_factors() -> None:
    found = register().subjects([[9, 1, 2], [3, 9]], [2, 1])
    assert found.factors_T is not None
    assert found.factors_T.tolist() == [1.0, 1.0, 2.0]
    assert found.budgets == (4.0, 4.0), "the record holds it, whether it crosses or not"


def test_what_the_data_says_holds_for_its_rows_and_what_follows_is_looked_at() -> None:
    one = register()
    one.add_rows([Tokens([1, 2], [3, 4], (LOW, 0, HIGH, 0)), Tokens([5], [6], (0, 0))])
    rows = [[1, 2, 3, 4], [1, 2], [1, 2, 3, 9, 4], [1, 2, 7, 9], [1, 7], [5, 6]]
    assert one.classes(rows) == [
        [LOW, 0, HIGH, 0],
        [LOW, 0],
        [LOW, 0, HIGH, HIGH, 0],
        [LOW, 0, 0, HIGH],
        [0, 0],
        [0, 0],
    ]
    assert one.subjects(rows, [1] * 6).budgets == (4.0, 4.0, 4.0, 4.0, math.inf, math.inf)


@pytest.mark.parametrize("tail", [None, 1, 3])
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_the_average_power_over_the_crossing_training_tokens_is_kept(tail: int | None, data: st.DataObject) -> None:
    rows = []
    for number in range(data.draw(st.integers(1, 5))):
        prompt, answer = data.draw(IDS), data.draw(IDS)
        classes = data.draw(st.tuples(*[st.integers(0, 2)] * (1 + len(prompt) + len(answer))))
        rows.append(Tokens([100 + number, *prompt], answer, classes))
    one = register()
    one.add_rows(rows, rows, tail)
    inputs = [[*row.prompt, *row.answer[:-1]] for row in rows]
    lengths = [min(tail or 99, len(row.prompt)) + len(row.answer) - 1 for row in rows]
    factors_T = one.subjects(inputs, lengths).factors_T
    assert factors_T is not None
    assert len(factors_T) == sum(lengths)
    assert float((factors_T.double() ** 2).mean()) == pytest.approx(1.0, rel=1e-5)


def test_the_scale_stays_over_a_restart_with_the_same_section_only(tmp_path: Path) -> None:
    rows = [Tokens([1], [2, 3], (HIGH, HIGH, 0))]
    register(tmp_path).add_rows(rows, rows)
    again, other = register(tmp_path), register(tmp_path, classes=CLASSES | {"more": {}})
    assert again.subjects([[9, 1]], [2]).factors_T == pytest.approx([1.0, 0.5])
    assert other.subjects([[9, 1]], [2]).factors_T == pytest.approx([2.0, 1.0])
    again.add_rows([], [Tokens([1], [2, 3], (0, 0, 0))])
    assert again.subjects([[9, 1]], [2]).factors_T == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"scale": "x", "section": {}}'])
def test_a_damaged_scale_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "sensitivity.json").write_text(content)
    with pytest.raises(RunError, match=r"sensitivity\.json"):
        register(tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_scale_is_named(tmp_path: Path, scale: float) -> None:
    section = SensitivitySection.model_validate({"function": "tests.unit.silo.test_records:nines", "classes": CLASSES})
    kept = {"scale": scale, "section": section.model_dump(mode="json")}
    (tmp_path / "sensitivity.json").write_text(json.dumps(kept))
    with pytest.raises(RunError, match=r"sensitivity\.json"):
        register(tmp_path)


def test_embeddings_are_taken_for_normal_text() -> None:
    one = register(classes=CLASSES | {"normal": {"noise": 0.25}})
    assert torch.equal(one.subjects(None, [2]).factors_T, torch.full((2,), 0.25))


class TestHistory:
    """What a generation said so far."""

    def test_its_record_and_classes_go_on_from_the_prompt(self) -> None:
        one = register()
        one.add_rows([Tokens([1, 2], [3], (LOW, 0, 0))])
        history = one.history(2)
        first = history.subjects([[1, 2], [9]], [2, 1])
        assert first.factors_T.tolist() == [0.5, 1.0, 2.0]
        assert first.records[0] == one.subjects([[1, 2]], [1]).records[0]
        second = history.subjects([[9], [4]], [1, 1])
        assert second.factors_T.tolist() == [2.0, 1.0]
        assert second.records == first.records
        assert second.budgets == (4.0, 4.0)

    def test_tokens_that_were_read_are_not_added_again(self) -> None:
        history = register().history(1)
        assert history.read_tokens([[9, 1, 2]]) == [[HIGH, 0, 0]]
        assert history.subjects([[9, 1]], [2]).factors_T.tolist() == [2.0, 1.0]
        assert history.read_tokens([[9]]) == [[HIGH, 0, 0, HIGH]]

    def test_rows_are_selected_and_tokens_forgotten(self) -> None:
        history = register().history(2)
        history.subjects([[9, 1], [2, 3]], [2, 2])
        history.select([1, 1, 0])
        history.subjects([[4], [9], [5]], [1, 1, 1])
        history.crop(1)
        assert history.read_tokens([[6], [9], [7]]) == [[0, 0, 0], [0, 0, HIGH], [HIGH, 0, 0]]

    def test_embeddings_end_what_is_known(self) -> None:
        history = register().history(1)
        first = history.subjects([[9]], [1])
        later = history.subjects(None, [3])
        history.crop(2)
        assert later.records == first.records
        assert later.factors_T.tolist() == [1.0] * 3
        assert history.read_tokens([[9]]) is None
        assert history.subjects([[9]], [1]).records == first.records


def test_all_turns_of_a_conversation_are_one_record() -> None:
    """Each turn's prompt holds what was said before it, so a budget of one turn would be spent for each."""
    one = Records()
    turns = [Tokens(prompt, [9], conversation="f:1") for prompt in ([5], [5, 9, 6], [1, 6])]  # the last is shortened
    other = [Tokens(prompt, [9], conversation="f:2") for prompt in ([7], [7, 9, 6])]
    one.add_rows([*turns, *other, Tokens([8], [9])])
    rows = [[5], [5, 9], [5, 9, 6, 9], [1, 6, 3], [7], [7, 9, 6], [8, 9]]
    names = one.record_names(rows)
    assert [names.index(name) for name in names] == [0, 0, 0, 0, 4, 4, 6]
    one.add_rows([Tokens([5, 9, 6], [9], conversation="f:3")])  # another with a turn in common
    assert one.record_names(rows) == names


def test_a_conversations_record_has_the_least_budget_of_its_turns() -> None:
    one = register()
    one.add_rows(
        [Tokens([5], [6], (0, 0), conversation="f:1"), Tokens([5, 6, 7], [8], (0, 0, HIGH, 0), conversation="f:1")]
    )
    assert one.subjects([[5, 6]], [2]).budgets == one.subjects([[5, 6, 7]], [3]).budgets == (4.0,)
