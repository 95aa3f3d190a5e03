"""A trunk of zeros answers a silo's steps, and nothing that would change a trunk."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.errors import ProtocolError
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe, save_tiny_model


def test_answers_have_the_shapes_of_a_trunks_and_are_zeros(tmp_path: Path) -> None:
    recipe = make_recipe(save_tiny_model("llama", tmp_path / "model"))
    trunk = ZeroTrunk(recipe)
    forward = pb.Forward(step=1, lengths=[2, 3], train=True, hidden=pb.Matrix(rows=5, width=8))
    answer: pb.Hidden = trunk.handle("a", forward).result()  # type: ignore[assignment]
    assert not codec.decode(answer.hidden, rows=5, width=32, codec="fp32").any()
    backward = pb.Backward(step=1, reply=True, gradient=pb.Matrix(rows=5, width=32))
    back: pb.Gradient = trunk.handle("a", backward).result()  # type: ignore[assignment]
    assert (back.gradient.rows, back.gradient.width) == (5, 8)
    for refused in (pb.Begin(), pb.Commit(), pb.End()):
        with pytest.raises(ProtocolError, match=type(refused).__name__):
            trunk.handle("a", refused)
