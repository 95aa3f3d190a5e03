"""Text out of an update: an exact one gives its tokens, what stands in the way is told, and nothing is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.attacks.gradients.update_inversion import match_gradients, run_dager
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import ObservedUpdate, TokenRow, View, aggregator_view
from isthmus.attacks.whole_model import WholeModel
from isthmus.errors import AttackError
from isthmus.model import adapters
from tests.conftest import make_recipe

ROW = TokenRow((5, 60, 17), (33,))


def view_of(folder: Path, *updates: ObservedUpdate, kind: str = "changes", **train: object) -> View:
    federation = {"lora": "alternating", "updates": kind}
    recipe = make_recipe(folder, federation=federation, train={"optimizer": "sgd", "steps": 1, "rounds": 2, **train})
    return aggregator_view(recipe, folder, updates, adapters.initial_tensors(_config(folder), recipe))


def _config(folder: Path) -> object:
    from isthmus.model.checkpoint import Checkpoint

    return Checkpoint(str(folder)).config


def observed(folder: Path) -> ObservedUpdate:
    """Minus the gradient of one row, of B alone: A's is zero while B is."""
    whole = WholeModel(Knowledge(view_of(folder)))
    whole.loss(ROW).backward()
    tensors = {
        name: -one.grad
        for part in (whole.bottom, whole.top)
        for name, one in adapters.trainable(part).items()
        if one.grad is not None and "lora_B" in name
    }
    return ObservedUpdate("a", 1, 1.0, tensors, (3,))


def test_what_stands_in_the_way_is_told(attacked_model: Path) -> None:
    found = run_dager(Knowledge(view_of(attacked_model, observed(attacked_model), steps=3)))
    assert found.ids
    assert any("step" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["changes", "gradients"])
def test_adam_hides_a_gradient_only_where_the_silo_steps(kind: str, attacked_model: Path) -> None:
    view = view_of(attacked_model, observed(attacked_model), kind=kind, optimizer="adamw")
    notes = run_dager(Knowledge(view)).notes
    assert any("adamw scales each coordinate" in note for note in notes) == (kind == "changes")


@pytest.mark.parametrize("attack", [run_dager, match_gradients])
def test_an_aggregator_that_got_nothing_finds_nothing(attacked_model: Path, attack: object) -> None:
    for updates in ((), (ObservedUpdate("a", 1, 0.0, {}, ()),)):
        with pytest.raises(AttackError):
            attack(Knowledge(view_of(attacked_model, *updates)))  # type: ignore[operator]


def test_lengths_must_be_known_to_match(attacked_model: Path) -> None:
    blind = ObservedUpdate("a", 1, 1.0, {"x": torch.ones(1)}, ())
    with pytest.raises(AttackError):
        match_gradients(Knowledge(view_of(attacked_model, blind)))
