"""Training on the trunk: steps open until their backward, gradients summed a silo, rounds saved and restored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import FrameError, OutOfOrderError, ProtocolError, UnknownStepError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.recipe import LoraSection, TrainSection
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.adapter import SharedAdapter
from isthmus.trunk.runner import Runner
from isthmus.trunk.training import OPEN_STEPS, BackwardStep, ForwardStep, InputGradient, TrunkTraining
from tests.conftest import save_tiny_model
from tests.oracle.twins import random_b

LENGTHS = [2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def training(folder: Path, tmp_path: Path) -> TrunkTraining:
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    adapters.add_adapter(part, LoraSection(rank=2), 0, freeze_a=True)
    adapters.load_adapter(part, random_b(adapters.adapter_of(part)))
    train = TrainSection(optimizer="sgd", learning_rate=0.1)
    return TrunkTraining(Runner(part), SharedAdapter(part, train), RoleDirectory(tmp_path))


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(seed))


def forward(training: TrunkTraining, *steps: tuple[str, int]) -> list[torch.Tensor]:
    for silo, step in steps:
        training.check_forward(silo, step, LENGTHS)
    return training.forward([ForwardStep(silo, step, hidden(), LENGTHS) for silo, step in steps])


def backward(training: TrunkTraining, silo: str, step: int, gradient: torch.Tensor | None = None) -> object:
    given = hidden(1) if gradient is None else gradient
    result = training.backward([BackwardStep(silo, step, given, True, False)])[0]
    return result.gradient_TD if isinstance(result, InputGradient) else result


def values(training: TrunkTraining) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in training._adapter.leaves("a").values()])


def test_a_backward_closes_its_step_and_gives_the_inputs_gradient(training: TrunkTraining) -> None:
    (output,) = forward(training, ("a", 1))
    assert not output.requires_grad
    gradient = backward(training, "a", 1)
    assert isinstance(gradient, torch.Tensor)
    assert gradient.shape == output.shape
    with pytest.raises(UnknownStepError, match="step 1 is not open"):
        backward(training, "a", 1)


def test_steps_of_one_pass_are_partners_until_it_has_no_graph(training: TrunkTraining) -> None:
    forward(training, ("a", 1), ("b", 1))
    assert training.partners("a", 1) == 2
    backward(training, "a", 1)
    assert training.partners("b", 1) == 1
    assert isinstance(backward(training, "b", 1), torch.Tensor), "it is computed again"


def test_a_step_moves_the_adapter_and_drops_what_is_open(training: TrunkTraining) -> None:
    before = values(training)
    forward(training, ("a", 1), ("a", 2))
    backward(training, "a", 1)
    training.step({"a": 5.0})
    assert not torch.equal(values(training), before)
    with pytest.raises(UnknownStepError):
        training.open_step("a", 2)


def test_the_tokens_of_a_silos_gradients_are_counted(training: TrunkTraining) -> None:
    assert training.counted("a") == 0
    for step in (1, 2):
        forward(training, ("a", step))
        assert training.counted("a") == 5 * (step - 1)
        backward(training, "a", step)
    forward(training, ("a", 3), ("b", 3))
    training.backward([BackwardStep("a", 3, hidden(), True, ascent_pass=True)])
    assert (training.counted("a"), training.counted("b")) == (10, 0)
    training.step({"a": 10.0})
    assert training.counted("a") == 0
    forward(training, ("a", 4))
    backward(training, "a", 4)
    training.restore(0)
    assert training.counted("a") == 0


def test_a_round_is_restored_and_an_unknown_one_refused(training: TrunkTraining) -> None:
    before = values(training)
    forward(training, ("a", 1))
    backward(training, "a", 1)
    training.step({"a": 5.0})
    training.save(1)
    training.restore(0)
    assert torch.equal(values(training), before)
    with pytest.raises(ProtocolError, match="no state of round 7"):
        training.restore(7)


def test_what_cannot_be_computed_is_refused(training: TrunkTraining) -> None:
    forward(training, ("a", 3))
    with pytest.raises(OutOfOrderError, match="step 3 after step 3"):
        training.check_forward("a", 3, LENGTHS)
    with pytest.raises(FrameError, match="context"):
        training.check_forward("a", 4, [513])
    forward(training, *(("a", step) for step in range(4, 4 + OPEN_STEPS - 1)))
    with pytest.raises(ProtocolError, match="wait for their backward"):
        training.check_forward("a", 99, LENGTHS)
    training.forget("a")
    training.check_forward("a", 1, LENGTHS)


def test_gradients_that_are_not_finite_are_an_error_of_that_step_alone(training: TrunkTraining) -> None:
    forward(training, ("a", 1), ("b", 1))
    huge = torch.full((sum(LENGTHS), 32), 1e38)
    assert isinstance(backward(training, "a", 1, huge), FrameError)
    assert isinstance(backward(training, "b", 1), torch.Tensor)
    assert isinstance(backward(training, "a", 1), torch.Tensor), "it stayed open"
