"""What is added where the parts meet: to which part, how it starts, and that nothing changes without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import ModelError
from isthmus.model import bottleneck
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.recipe import BoundarySection
from tests.conftest import save_tiny_model

ALL = {bottleneck.DOWN, bottleneck.UP, bottleneck.GATE, bottleneck.DENOISE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def parts(folder: Path, section: BoundarySection, *, frozen: bool = False) -> dict[str, Part]:
    made = {name: load_part(Checkpoint(str(folder)), Cut(1, 1), name) for name in ("bottom", "trunk", "top")}  # type: ignore[arg-type]
    for part in made.values():
        bottleneck.add_layers(part, section, frozen=frozen)
    return made


def added(part: Part) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name in sorted(ALL) if (one := bottleneck.layer_weight(part, name)) is not None}


def test_each_part_gets_its_own(folder: Path) -> None:
    made = parts(folder, BoundarySection(width=4, residual=True, denoise=True))
    assert added(made["bottom"]) == {bottleneck.DOWN: (4, 32)}
    assert added(made["trunk"]) == {bottleneck.UP: (32, 4)}
    assert added(made["top"]) == {bottleneck.DENOISE: (32, 4), bottleneck.GATE: (32,)}


def test_without_any_of_it_nothing_is_added(folder: Path) -> None:
    assert [added(part) for part in parts(folder, BoundarySection()).values()] == [{}, {}, {}]
    h_TD = torch.ones(2, 32)
    assert bottleneck.project(h_TD, None) is h_TD


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_frozen_does_not_train(folder: Path, frozen: bool) -> None:
    part = parts(folder, BoundarySection(width=4), frozen=frozen)["bottom"]
    weight = bottleneck.layer_weight(part, bottleneck.DOWN)
    assert weight is not None
    assert weight.requires_grad != frozen


def test_down_and_up_start_as_one_orthonormal_basis() -> None:
    down, up = (
        bottleneck.initial_value(f"{name}.weight", torch.Size(shape), torch.Generator().manual_seed(3), narrow=True)
        for name, shape in ((bottleneck.DOWN, (4, 32)), (bottleneck.UP, (32, 4)))
    )
    torch.testing.assert_close(down, up.T)
    torch.testing.assert_close(down @ up, torch.eye(4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("narrow", "value"), [(True, 0.0), (False, 1.0)])
def test_the_gate_starts_shut_behind_a_bottleneck_and_open_else(narrow: bool, value: float) -> None:
    draw = torch.Generator()
    gate = bottleneck.initial_value(f"{bottleneck.GATE}.weight", torch.Size([5]), draw, narrow=narrow)
    assert gate.tolist() == [value] * 5
    assert not bottleneck.initial_value(f"{bottleneck.DENOISE}.weight", torch.Size([5, 2]), draw, narrow=narrow).any()


def test_a_bottleneck_as_wide_as_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"boundary\.width is 32"):
        parts(folder, BoundarySection(width=32))
