"""Gradient matching on a tiny model: the text is found in a clean gradient, and not in a drowned one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus.attacks.gradients.gradient_matching import GradientMatcher, GradientOf, MatcherSettings, adapter_gradient
from isthmus.errors import DataError
from tests.conftest import make_recipe, save_tiny_model, uncut
from tests.oracle.twins import lora_of, with_lora

TEXT, ANSWER = [23, 60, 17, 88], 30
SETTINGS = MatcherSettings(starts=16, steps=200, every=50, moves=60, tries=4)


class Victim:
    """An uncut model with adapters on every block, of which the ends' B are what the root sees."""

    def __init__(self, folder: Path, answer: int = ANSWER) -> None:
        recipe = make_recipe(folder, lora={"rank": 4})
        torch.manual_seed(0)  # peft draws A
        self.model = with_lora(uncut(folder), recipe)
        ends = (".layers.0.", ".layers.4.")
        self.adapter: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in lora_of(self.model).items()
            if "lora_B" in name and any(end in name for end in ends)
        }
        self.embedding_VD = self.model.get_input_embeddings().weight.detach()
        labels_L = torch.tensor([-100] * len(TEXT) + [answer])
        self.gradient_of: GradientOf = adapter_gradient(self.model, self.adapter, labels_L)

    def observed(self, noise: float = 0.0) -> dict[str, torch.Tensor]:
        """The gradient of the text, with noise that is a multiple of its size."""
        found = self.gradient_of(self.embedding_VD[[*TEXT, ANSWER]])
        draw = torch.Generator().manual_seed(1)
        return {
            name: one + noise * one.square().mean().sqrt() * torch.randn(one.shape, generator=draw)
            for name, one in found.items()
        }

    def matcher(self, noise: float = 0.0, settings: MatcherSettings = SETTINGS) -> GradientMatcher:
        return GradientMatcher(self.gradient_of, self.observed(noise), self.embedding_VD, settings=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("matching"))


def right(ids: list[int]) -> float:
    return sum(one == two for one, two in zip(ids, TEXT, strict=False)) / len(TEXT)


def test_a_text_is_found_in_a_clean_gradient(folder: Path) -> None:
    match = Victim(folder).matcher().match(len(TEXT) + 1, {len(TEXT): ANSWER})
    assert right(match.ids) >= 0.8
    assert match.distance < 0.2


def test_a_drowned_gradient_gives_nothing(folder: Path) -> None:
    match = (
        Victim(folder)
        .matcher(noise=30.0, settings=MatcherSettings(starts=4, steps=100, tries=1, sweeps=1))
        .match(len(TEXT) + 1, {len(TEXT): ANSWER})
    )
    assert right(match.ids) <= 0.2


def test_the_right_label_matches_best(folder: Path) -> None:
    """With the text known but for its label, the gradient's distance names it."""
    observed = Victim(folder).observed()
    apart = {}
    for answer in (ANSWER, 31, 77):
        victim = Victim(folder, answer)
        matcher = GradientMatcher(victim.gradient_of, observed, victim.embedding_VD)
        apart[answer] = float(matcher.distance(victim.embedding_VD[[*TEXT, ANSWER]]).detach())
    assert apart[ANSWER] < 1e-5
    assert min(apart, key=apart.__getitem__) == ANSWER


def test_known_tokens_stay(folder: Path) -> None:
    known = {0: TEXT[0], 3: TEXT[3], len(TEXT): ANSWER}
    quick = MatcherSettings(starts=2, steps=10, every=5, moves=5, tries=1, sweeps=1)
    ids = Victim(folder).matcher(settings=quick).match(len(TEXT) + 1, known).ids
    assert all(ids[place] == token for place, token in known.items())


def test_fluency_weighs_where_gradients_cannot(folder: Path) -> None:
    """A language model that wants token 9 in front gets it, if it is weighed heavily enough."""
    victim = Victim(folder)
    settings = MatcherSettings(starts=1, steps=5, every=5, moves=300, fluency=100.0)
    matcher = GradientMatcher(
        victim.gradient_of,
        victim.observed(),
        victim.embedding_VD,
        text_loss=lambda ids: float(ids[0] != 9),
        settings=settings,
    )
    start_LD = victim.embedding_VD[[40, 50, 9, 60, ANSWER]]
    assert matcher.nearest(start_LD) == [40, 50, 9, 60, ANSWER]
    moved_LD = matcher._moved([40, 50, 9, 60, ANSWER], start_LD + 100, {})
    assert matcher.nearest(moved_LD)[0] == 9


def test_signs_are_what_adamw_s_first_step_makes(folder: Path) -> None:
    victim = Victim(folder)
    labels_L = torch.tensor([-100] * len(TEXT) + [ANSWER])
    signed = adapter_gradient(victim.model, victim.adapter, labels_L, signs=True)
    x_LD = victim.embedding_VD[[*TEXT, ANSWER]]
    own = list(victim.adapter.values())
    before = [parameter.detach().clone() for parameter in own]
    for parameter, gradient in zip(own, victim.gradient_of(x_LD).values(), strict=True):
        parameter.grad = gradient.clone()
    torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0).step()
    update = {
        name: before[number] - parameter.detach() for number, (name, parameter) in enumerate(victim.adapter.items())
    }
    with torch.no_grad():
        for parameter, old in zip(own, before, strict=True):
            parameter.copy_(old)
    apart = float(GradientMatcher(signed, update, victim.embedding_VD).distance(x_LD).detach())
    plain = float(GradientMatcher(victim.gradient_of, update, victim.embedding_VD).distance(x_LD).detach())
    assert apart < plain < 0.5


def test_unusable_updates_are_named(folder: Path) -> None:
    victim = Victim(folder)
    with pytest.raises(DataError, match="the update is zero"):
        GradientMatcher(victim.gradient_of, {"x": torch.zeros(2)}, victim.embedding_VD)
    with pytest.raises(DataError, match="no gradient of y"):
        GradientMatcher(victim.gradient_of, {"y": torch.ones(2)}, victim.embedding_VD).match(len(TEXT) + 1)
