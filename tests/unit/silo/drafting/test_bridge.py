"""The bridge and its session: what it was told stands in place of guesses, and forgetting leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DataError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.crossing import Outbound
from isthmus.model.cut import Part
from isthmus.model.rounded_linear import Int8Linear
from isthmus.silo.drafting.bridge import Bridge, restrict_head
from isthmus.silo.join import load_ends
from tests.conftest import make_recipe, save_tiny_model

WIDTH = 32


@pytest.fixture(scope="module", params=[("llama", None), ("gemma2", None), ("llama", "int8")], ids=str)
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Part, Part]:
    family, weights = request.param
    folder = save_tiny_model(family, tmp_path_factory.mktemp("model"))
    return load_ends(Checkpoint(str(folder)), make_recipe(folder, model={"bottom": 2}), weights=weights)


@pytest.fixture(scope="module")
def bridge(ends: tuple[Part, Part]) -> Bridge:
    torch.manual_seed(0)
    bridge = Bridge(ends[0], 2).eval()
    torch.nn.init.normal_(bridge.join.weight, std=0.2)
    return bridge


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_steps_equal_one_piece(bridge: Bridge, data: st.DataObject) -> None:
    """Drafts of any length, forgotten and followed by the trunk's answers, against one look at the whole text."""
    length = data.draw(st.integers(2, 40))
    draw = torch.Generator().manual_seed(length)
    h_LD, g_LD = (torch.randn(length, WIDTH, generator=draw) for _ in range(2))
    session, fed = bridge.open_session(), 0
    with torch.no_grad():
        while fed < length - 1:
            sure = data.draw(st.integers(fed + 1, length - 1))
            session.set_answers(g_LD[fed:sure])
            ahead = data.draw(st.integers(1, length - sure))
            out_LD = session.step(h_LD[fed : sure + ahead], [sure + ahead - fed])
            assert torch.equal(out_LD[: sure - fed], g_LD[fed:sure])
            before_LD = torch.cat([torch.zeros(1, WIDTH), g_LD[:sure]])
            whole_LD = bridge.predict(h_LD[None, : sure + 1], before_LD[None])[0]
            assert torch.allclose(out_LD[sure - fed], whole_LD[-1], atol=1e-4)
            session.crop(ahead)
            fed = sure


def test_without_a_session_rows_stand_alone(bridge: Bridge) -> None:
    h_TD = torch.randn(7, WIDTH)
    with torch.no_grad():
        both = bridge(Outbound([3, 4], h_TD)).g_TD
        assert torch.allclose(both[3:], bridge.open_session().step(h_TD[3:], [4]), atol=1e-5)


def test_one_row_only(bridge: Bridge) -> None:
    session = bridge.open_session()
    with pytest.raises(DataError, match="remedy: draft for one row at a time"):
        session.step(torch.randn(4, WIDTH), [2, 2])
    with pytest.raises(DataError, match="one row"):
        session.select([0, 0])
    session.select([0])
    session.close()


def test_a_narrow_head_gives_the_same_logits(ends: tuple[Part, Part]) -> None:
    vocabulary, h_BLD = torch.tensor([3, 50, 7]), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        whole = ends[1].model(inputs_embeds=h_BLD, use_cache=False).logits
        few = restrict_head(ends[1], vocabulary).model(inputs_embeds=h_BLD, use_cache=False).logits
    rounding = 2**-8 if isinstance(ends[1].head, Int8Linear) else 1e-6
    assert torch.allclose(few, whole[..., vocabulary], atol=rounding)
    assert ends[1].model(inputs_embeds=h_BLD, use_cache=False).logits.shape[-1] == whole.shape[-1]


def test_blocks_are_copies(ends: tuple[Part, Part], tmp_path: Path) -> None:
    """Also of rounded weights, whose copies are whole numbers no more."""
    own = Bridge(ends[0], 1)
    for name, parameter in own.part.model.named_parameters():
        module, _, leaf = name.replace("layers.0.", "layers.1.").rpartition(".")
        layer = ends[0].model.get_submodule(module)
        copied = getattr(getattr(layer, "base_layer", layer), leaf)
        assert torch.equal(parameter, copied)
        assert parameter.data_ptr() != copied.data_ptr()
        assert parameter.requires_grad
