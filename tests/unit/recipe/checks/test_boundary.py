"""The boundary beside the adapters: examples released once, and the defence."""

from __future__ import annotations

import pytest

from tests.unit.recipe.refusals import OUT, Case, assert_mended, name_of

FROZEN = {"lora.freeze_bottom": True}
REFUSED: list[Case] = [
    (
        {"boundary.release_once": True},
        "boundary.release_once: a bottom that trains gives new states",
        "lora.freeze_bottom = true",
        FROZEN,
    ),
    (
        FROZEN | {"boundary": {"release_once": True, "denoise": True}},
        "boundary.denoise: the noise of examples released once is not kept",
        "leave out denoise",
        {"boundary.denoise": OUT},
    ),
    (
        {"boundary": {"differences": True, "codec": {"forward_down": "range-0.5"}}},
        "boundary.differences: without numbers neither side knows",
        "set boundary.release_once = true",
        FROZEN | {"boundary.release_once": True},
    ),
    (
        FROZEN | {"boundary": {"release_once": True, "differences": True}},
        "boundary.differences: 'fp32' writes no differences",
        'set boundary.codec.forward_down = "range-0.5"',
        {"boundary.codec": "range-0.5"},
    ),
    (
        FROZEN | {"boundary.defence": {"inverter": 1.0}},
        "boundary.defence: a frozen bottom learns nothing",
        "set lora.freeze_bottom = false",
        {"lora.freeze_bottom": False},
    ),
    (
        {"boundary": {"gradients": False, "defence": {}}},
        "boundary.defence: no loss reaches bottom",
        "set boundary.residual = true",
        {"boundary.residual": True},
    ),
    (
        {"boundary.defence": {"answer": 1.0, "capacity": 0.1}},
        "boundary.defence.capacity: without noise or clip the channel's capacity is infinite",
        "give boundary.forward both",
        {"boundary.forward": {"clip": 1.0, "noise": 0.1}},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_does_not_go_together_is_refused(case: Case) -> None:
    assert_mended(case)
