"""What a silo computes and refuses once a root that lies has given it adapters."""

from __future__ import annotations

import pytest
import torch

from isthmus.audit.active import steering_of
from isthmus.audit.capture import capture_rows
from isthmus.audit.target import Target
from isthmus.errors import FrameError, ProtocolError
from tests.unit.attacks.attacked import random_rows

ROWS = random_rows(5, 3)


def with_(target: Target, **sections: object) -> Target:
    """The target without noise, with these sections' keys changed."""
    boundary = target.recipe.boundary
    clean = boundary.model_copy(update={"forward": boundary.forward.model_copy(update={"noise": 0.0})})
    changed = {key: getattr(target.recipe, key).model_copy(update=one) for key, one in sections.items()}
    return Target(target.recipe.model_copy(update={"boundary": clean, **changed}))


def test_under_the_published_adapters_the_same_crosses(two_silos: Target) -> None:
    target = with_(two_silos)
    steering = steering_of(target, "a", ROWS)
    found = steering.give(steering.adapters)
    expected = capture_rows(target, "a", ROWS).crossings
    assert all(torch.equal(one.hidden_LD, two.hidden_LD) for one, two in zip(found, expected, strict=True))


def test_under_others_it_is_other(two_silos: Target) -> None:
    target = with_(two_silos)
    steering = steering_of(target, "a", ROWS)
    assert steering.reach is None
    given = {name: one + 0.5 for name, one in steering.adapters.items()}
    expected = capture_rows(target, "a", ROWS).crossings
    found = steering.give(given)
    assert all(not torch.allclose(one.hidden_LD, two.hidden_LD) for one, two in zip(found, expected, strict=True))


def test_the_silo_refuses_what_its_worker_would(two_silos: Target) -> None:
    steering = steering_of(with_(two_silos, federation={"max_change": 0.5}), "a", ROWS)
    assert steering.reach == 0.5, "one round"
    with pytest.raises(ProtocolError, match="max_change"):
        steering.give({name: one + 0.5 for name, one in steering.adapters.items()})
    frozen = steering_of(with_(two_silos, lora={"freeze_bottom": True}), "a", ROWS)
    assert len(frozen.adapters) < len(steering.adapters)
    with pytest.raises(FrameError, match="unexpected tensor"):
        frozen.give(steering.adapters)
    frozen.give(frozen.adapters)
