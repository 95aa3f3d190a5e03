"""Settings of optimizers: read from one, sent, and given to another, which then takes the same steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from isthmus.errors import NotSupportedError
from isthmus.model.optimizer_settings import OptimizerSettings
from isthmus.wire import isthmus_pb2 as pb

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda them: torch.optim.SGD(them, lr=0.1),
    "momentum": lambda them: torch.optim.SGD(them, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "dampened": lambda them: torch.optim.SGD(them, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": lambda them: torch.optim.Adam(them, lr=0.1, weight_decay=0.1, betas=(0.5, 0.7), eps=1e-3),
    "adamw": lambda them: torch.optim.AdamW(them, lr=0.1, weight_decay=0.1),
    "amsgrad": lambda them: torch.optim.AdamW(them, lr=torch.tensor(0.1), amsgrad=True),
}


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.arange(4.0) - 1)


def settings_of(optimizer: torch.optim.Optimizer) -> OptimizerSettings:
    group = optimizer.param_groups[0]
    return OptimizerSettings.of(optimizer, group, group["params"][0])


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_with_received_settings_takes_the_same_steps(build: Build) -> None:
    own, theirs = parameter(), parameter()
    optimizer, follower = build([own]), torch.optim.SGD([theirs], lr=7.0)
    for number in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)  # a schedule
        sent = pb.Optimizer.FromString(settings_of(optimizer).message().SerializeToString())
        settings = OptimizerSettings.received(sent)
        assert settings.fresh == (not number or build is OPTIMIZERS["sgd"])
        if settings.fits(follower):
            settings.apply(follower)
        else:
            follower = settings.optimizer([theirs])
        for one, stepped in ((own, optimizer), (theirs, follower)):
            one.grad = torch.cos(one.detach() + number)
            stepped.step()
    assert torch.equal(own, theirs)
    assert not torch.equal(own, parameter())


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda them: torch.optim.RMSprop(them), "RMSprop"),
        (lambda them: type("Eccentric", (torch.optim.AdamW,), {})(them), "Eccentric"),
        (lambda them: torch.optim.AdamW(them, maximize=True), "maximize"),
    ],
)
def test_others_are_refused(build: Build, told: str) -> None:
    with pytest.raises(NotSupportedError, match=told) as refused:
        settings_of(build([parameter()]))
    assert "adamw_torch" in refused.value.remedy
