"""The plan of a part's attention: each block's mask and the shape of its keys, as the family's own code has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.errors import ModelError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.trunk.attention_plan import plan_attention
from tests.conftest import plan_of, save_tiny_model


def trunk_of(family: str, folder: Path, **config: Any) -> Part:
    return load_part(Checkpoint(str(save_tiny_model(family, folder, **config))), Cut(1, 1), "trunk")


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", [None, None, None]),
        ("mistral", [16, 16, 16]),
        ("cohere2", [None, 16, 16]),
        ("qwen3", [None, 16, 16]),
        ("gpt_oss", [None, 16, 16]),
    ],
)
def test_windows_are_those_of_the_uncut_blocks(family: str, windows: list[int | None], tmp_path: Path) -> None:
    plan = plan_attention(trunk_of(family, tmp_path))
    assert [rule.window for rule in plan.rules] == windows
    assert plan.uniform == (family != "gpt_oss")
    assert plan.settings == ({"s_aux"} if family == "gpt_oss" else set())
    assert (plan.heads, plan.key_width, plan.value_width) == (2, 8, 8)
    assert plan.attention == ("eager" if family == "gpt_oss" else "sdpa")


def test_keys_wider_than_values_need_the_familys_own_attention(tmp_path: Path) -> None:
    plan = plan_attention(trunk_of("deepseek_v3", tmp_path))
    assert (plan.heads, plan.key_width, plan.value_width) == (4, 12, 6)
    assert not plan.uniform


def test_probing_leaves_the_part_as_it_was(tmp_path: Path) -> None:
    part = trunk_of("llama", tmp_path)
    h_1TD = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    before = part.hidden(inputs_embeds=h_1TD, use_cache=False)
    plan_attention(part)
    assert torch.equal(part.hidden(inputs_embeds=h_1TD, use_cache=False), before)


def test_attention_to_later_tokens_is_refused(tmp_path: Path) -> None:
    part = trunk_of("gemma3_text", tmp_path)
    part.config.use_bidirectional_attention = True
    with pytest.raises(ModelError, match="later tokens"):
        plan_attention(part)


def test_a_block_without_transformers_attention_is_refused(tmp_path: Path) -> None:
    part = trunk_of("llama", tmp_path)

    class Recurrent(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states.cumsum(dim=1)

    part.model.model.layers[1] = Recurrent()
    with pytest.raises(ModelError, match="not the same call in every block"):
        plan_attention(part)


def test_a_plan_says_whether_one_kernel_can_do_it() -> None:
    assert plan_of("sdpa").uniform
    assert not plan_of("sdpa", widths=(8, 6)).uniform
