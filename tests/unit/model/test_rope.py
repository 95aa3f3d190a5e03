"""Rotary embeddings by sequence: each token's are those of its own sequence, bit for bit, whatever was asked before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from isthmus.model.rope import (
    SequenceRope,
    by_length,
    context_length,
    given_lengths,
    install,
    recomputed_after,
    token_places,
)
from tests.conftest import tiny_config
from tests.oracle.ropes import BASE, ROPES, SWITCH

X = torch.zeros(1, 1, 1)
DEPENDENT = ("dynamic", "longrope")


def config_of(family: str, kind: str) -> Any:
    config = tiny_config(family, 2)
    config.rope_parameters = {"rope_type": kind, **BASE, **ROPES[kind]}
    config.max_position_embeddings = SWITCH if kind == "dynamic" else 512
    if family == "phi3":
        config.original_max_position_embeddings = SWITCH
    return config


def model_of(family: str, kind: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config_of(family, kind)).eval()
    install(model, model.model)
    return model


def alone(rope: SequenceRope, length: int) -> tuple[torch.Tensor, ...]:
    """The family's own answer to one whole sequence, by a module that was asked nothing before."""
    return copy.deepcopy(rope.rope)(X, torch.arange(length)[None])


@pytest.mark.parametrize("kind", ROPES)
def test_only_kinds_that_look_at_lengths_are_replaced(kind: str) -> None:
    rope = model_of("llama", kind).model.rotary_emb
    assert isinstance(rope, SequenceRope) == by_length(config_of("llama", kind)) == (kind in DEPENDENT)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_sequences_of_all_lengths_in_one_pass_are_each_alone_bit_for_bit(kind: str) -> None:
    rope = model_of("llama", kind).model.rotary_emb
    lengths = [40, 3, SWITCH, SWITCH + 1, 1, 25]
    for _ in range(2):
        got = rope(X, torch.cat([torch.arange(length) for length in lengths])[None])
        for number, length in enumerate(lengths):
            for one, expected in zip(got, alone(rope, length), strict=True):
                assert torch.equal(torch.split(one, lengths, dim=1)[number], expected)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_lengths_that_are_given_decide(kind: str) -> None:
    model = model_of("llama", kind)
    ids_1L = torch.arange(20)[None]
    found = []
    model.model.rotary_emb.register_forward_hook(lambda *call: found.append(call[-1]))
    with given_lengths([40]):
        model(ids_1L)
    with given_lengths(None):
        model(ids_1L)
    rope = model.model.rotary_emb
    assert torch.equal(found[0][0], alone(rope, 40)[0][:, :20])
    assert torch.equal(found[1][0], alone(rope, 20)[0])


def test_a_layer_type_has_its_own_kind() -> None:
    config = tiny_config("gemma3_text", 2)
    config.layer_types = ["sliding_attention", "full_attention"]
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", **BASE},
        "full_attention": {"rope_type": "dynamic", **BASE, **ROPES["dynamic"]},
    }
    config.max_position_embeddings = SWITCH
    model = AutoModelForCausalLM.from_config(config)
    install(model, model.model)
    rope: Any = model.model.rotary_emb
    positions = torch.cat([torch.arange(40), torch.arange(3)])[None]
    for kind in config.layer_types:
        expected = [copy.deepcopy(rope.rope)(X, torch.arange(length)[None], kind) for length in (40, 3)]
        for number, got in enumerate(rope(X, positions, kind)):
            assert torch.equal(got, torch.cat([one[number] for one in expected], dim=1))
    assert by_length(config)
    assert context_length(config) == 8 * SWITCH


def test_an_error_within_a_pass_leaves_nothing_behind() -> None:
    model = model_of("llama", "dynamic")
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    rope = model.model.rotary_emb
    assert torch.equal(rope(X, torch.arange(30)[None])[0], alone(rope, 30)[0])


def test_places_of_tokens() -> None:
    """Two rows: padded on the left, and two sequences with padding behind them."""
    positions_BL = torch.tensor([[1, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]])
    real_BL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    places = token_places(positions_BL, real_BL)
    assert places.lengths_BL[0, 2:].tolist() == [4] * 4
    assert places.lengths_BL[1].tolist() == [3, 3, 3, 2, 2, 2]
    assert bool((places.positions_BL < places.lengths_BL).all())
    assert torch.equal(places.positions_BL[real_BL], positions_BL[real_BL])
    drafts = token_places(positions_BL, real_BL, alone=True)
    assert torch.equal(drafts.lengths_BL, positions_BL + 1)


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [("phi3", "longrope", SWITCH), ("llama", "longrope", None), ("llama", "dynamic", None)],
)
def test_the_family_says_whether_its_generation_drops_the_cache(family: str, kind: str, expected: int | None) -> None:
    assert recomputed_after(model_of(family, kind)) == expected


def test_the_switch_and_the_context() -> None:
    assert model_of("llama", "longrope").model.rotary_emb.switch() == SWITCH
    assert model_of("llama", "dynamic").model.rotary_emb.switch() is None
    contexts = {kind: context_length(config_of("llama", kind)) for kind in ROPES}
    assert contexts == {**dict.fromkeys(ROPES, 512), "dynamic": 8 * SWITCH}


def test_a_model_with_it_is_copied_and_saved_like_any(tmp_path: Path) -> None:
    model = model_of("llama", "longrope")
    twin = copy.deepcopy(model)
    ids_1L = torch.arange(30)[None]
    assert torch.equal(twin(ids_1L).logits, model(ids_1L).logits)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "longrope"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids_1L).logits, model(ids_1L).logits)
