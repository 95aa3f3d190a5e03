"""Membership: an overfit tiny model gives its rows away, a drowned one does not; the figures against obvious ones."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.attacks.membership.inference import by_difficulty, by_likelihood, by_loss, row_losses, separation
from isthmus.errors import DataError
from tests.unit.attacks.membership.overfit import losses, trained

Texts = list[list[int]]
ROWS, REFERENCES = 40, 4


def texts(count: int, seed: int) -> Texts:
    """Some of many repeats, some all different: difficulty differs between rows."""
    draw = random.Random(seed)
    return [draw.choices(range(4, 8 + 8 * (row % 6)), k=12) for row in range(count)]


@pytest.fixture(scope="module")
def rows() -> tuple[Texts, Texts]:
    return texts(ROWS, seed=1), texts(ROWS, seed=2)


@pytest.fixture(scope="module")
def references(tiny: Path, rows: tuple[Texts, Texts]) -> list[list[float]]:
    models = [trained(tiny, texts(ROWS, seed=10 + number), steps=25) for number in range(REFERENCES)]
    return [losses(model, rows[0] + rows[1]) for model in models]


def test_an_overfit_model_gives_its_rows_away(
    tiny: Path, rows: tuple[Texts, Texts], references: list[list[float]]
) -> None:
    own = losses(trained(tiny, rows[0], steps=25), rows[0] + rows[1])
    told = [True] * ROWS + [False] * ROWS
    by = {
        "loss": separation(by_loss(own), told).auc,
        "difficulty": separation(by_difficulty(own, references), told).auc,
        "likelihood": separation(by_likelihood(own, references), told).auc,
    }
    assert by["difficulty"].value > 0.9
    assert by["likelihood"].value > 0.9
    assert by["loss"].value < min(by["difficulty"].value, by["likelihood"].value)
    assert all(one.low <= one.value <= one.high for one in by.values())


def test_a_drowned_model_does_not(tiny: Path, rows: tuple[Texts, Texts], references: list[list[float]]) -> None:
    own = losses(trained(tiny, rows[0], steps=25, noise=30.0), rows[0] + rows[1])
    told = [True] * ROWS + [False] * ROWS
    for scores in (by_loss(own), by_difficulty(own, references), by_likelihood(own, references)):
        auc = separation(scores, told).auc
        assert auc.low < 0.5 < auc.high


def test_online_references_are_used_where_both_kinds_are_known() -> None:
    """Members' confidence moves down here: only models that were trained on the rows show that."""
    draw = np.random.default_rng(0)
    trained_on = draw.random((40, 60)) < 0.5
    reference = 1 + 0.5 * trained_on + 0.1 * draw.standard_normal((40, 60))
    members = draw.random(60) < 0.5
    own = 1 + 0.5 * members + 0.1 * draw.standard_normal(60)
    online = separation(by_likelihood(own.tolist(), reference.tolist(), trained_on.tolist()), members.tolist()).auc
    outside = np.where(trained_on, reference - 0.5, reference)
    offline = separation(by_likelihood(own.tolist(), outside.tolist()), members.tolist()).auc
    assert online.value > 0.99
    assert offline.value < 0.1


def test_row_losses_are_the_model_s_own(tiny: Path) -> None:
    model = trained(tiny, texts(4, seed=0), steps=1)
    ids = torch.tensor(texts(3, seed=5))
    labels = ids.clone()
    labels[:, :7] = -100
    with torch.no_grad():
        found = row_losses(model(input_ids=ids).logits, labels)
        one_by_one = [float(model(input_ids=ids[n : n + 1], labels=labels[n : n + 1]).loss) for n in range(3)]
    assert found.tolist() == pytest.approx(one_by_one, rel=1e-5)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30), st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_figures_are_those_of_plain_counting(rows: list[tuple[int, bool]], fpr: float) -> None:
    """Oracle: pairs counted one by one, and every threshold tried."""
    ins, outs = [one for one, member in rows if member], [one for one, member in rows if not member]
    if not ins or not outs:
        with pytest.raises(DataError, match="only members"):
            separation([one for one, _ in rows], [member for _, member in rows])
        return
    found = separation([one for one, _ in rows], [member for _, member in rows], fpr=fpr, draws=2)
    pairs = [(a > b) + 0.5 * (a == b) for a in ins for b in outs]
    assert found.auc.value == pytest.approx(sum(pairs) / len(pairs))
    thresholds = [9, *range(7)]
    tprs = [
        sum(a >= t for a in ins) / len(ins) for t in thresholds if sum(b >= t for b in outs) <= fpr * len(outs) + 1e-9
    ]
    assert found.tpr.value == pytest.approx(max(tprs))


def test_unusable_input_is_named() -> None:
    with pytest.raises(DataError, match="no variance"):
        by_likelihood([1.0], [[1.0]])
    with pytest.raises(DataError, match="reference losses"):
        by_difficulty([1.0, 2.0], [[1.0]])
    with pytest.raises(DataError, match="marks"):
        by_likelihood([1.0], [[1.0], [1.0]], [[True]])
    with pytest.raises(DataError, match="supervised"):
        row_losses(torch.zeros(1, 3, 5), torch.tensor([[4, -100, -100]]))
