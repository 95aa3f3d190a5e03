"""The trunk's codecs: tensors out of matrices and back, by the recipe's codec of each direction, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isthmus.errors import FrameError, UnknownExampleError
from isthmus.recipe.sections.boundary.codec import CodecSection
from isthmus.trunk.codecs import Codecs
from isthmus.trunk.kept_examples import KeptExamples
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe

NARROW, WIDTH = 4, 8
SECTION = CodecSection(forward_up="fp32", forward_down="bf16", gradient_up="fp16", gradient_down="int8")


@pytest.fixture
def codecs(tmp_path: Path) -> Codecs:
    kept = KeptExamples(tmp_path, make_recipe(Path("none")), NARROW, torch.device("cpu"))
    return Codecs(SECTION, NARROW, WIDTH, kept)


def matrix(width: int, name: str, rows: int = 3) -> pb.Matrix:
    return codec.encode(torch.ones(rows, width), name)


def test_hidden_states_come_narrow_and_go_wide(codecs: Codecs) -> None:
    request = pb.Forward(lengths=[1, 2], hidden=matrix(NARROW, "fp32"))
    assert torch.equal(codecs.decode_forward("a", request), torch.ones(3, NARROW))
    answer = codecs.encode_hidden(torch.ones(3, WIDTH))
    assert (answer.hidden.codec, answer.hidden.rows) == ("bf16", 3)


def test_gradients_come_and_go_wide(codecs: Codecs) -> None:
    assert torch.equal(codecs.decode_gradient(matrix(WIDTH, "fp16"), 3), torch.ones(3, WIDTH))
    answer = codecs.encode_gradient(torch.ones(3, WIDTH), 2.0)
    assert (answer.gradient.codec, answer.norm) == ("int8", 2.0)
    assert not codecs.encode_gradient(None, 2.0).HasField("gradient")


@pytest.mark.parametrize(
    ("bad", "rows"),
    [
        (matrix(WIDTH, "fp32"), 3),
        (matrix(NARROW, "bf16"), 3),
        (matrix(NARROW, "fp32"), 4),
        (codec.encode(torch.full((3, NARROW), float("nan")), "fp32"), 3),
    ],
    ids=["width", "codec", "rows", "nan"],
)
def test_another_matrix_is_refused(codecs: Codecs, bad: pb.Matrix, rows: int) -> None:
    with pytest.raises(FrameError):
        codecs.decode_hidden(bad, rows)


def test_an_example_that_is_not_kept_is_named(codecs: Codecs) -> None:
    with pytest.raises(UnknownExampleError):
        codecs.decode_forward("a", pb.Forward(lengths=[1], examples=[7]))
