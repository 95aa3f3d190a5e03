"""A caller's arguments: the rule of positions, and what is refused of a configuration or a generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from isthmus.errors import DataError, IsthmusError, NotSupportedError
from isthmus.model.arguments import (
    check_cache,
    check_counted,
    check_generation,
    check_labels,
    check_packed_arguments,
    check_skipped,
    check_tokens,
    find_places,
    take_arguments,
)
from isthmus.model.cache import SplitCache
from isthmus.model.cut import Cut, empty_part
from isthmus.model.packing import Packing
from tests.conftest import tiny_config

IDS = torch.arange(4, 10).view(2, 3)


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(one) for one in row] for row in rows])


def positions(*rows: str) -> torch.Tensor:
    return mask(*rows)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans(), st.booleans(), st.integers(0, 3))
def test_a_mask_counts_positions_from_each_rows_first_token(
    lengths: list[int], left: bool, positioned: bool, filler: int
) -> None:
    longest = max(lengths)
    real = Packing.of_lengths(lengths, torch.device("cpu"), pad_left=left).real_BL
    expected = torch.full(real.shape, filler)
    for row, length in enumerate(lengths):
        expected[row, real[row]] = torch.arange(length)
    places = find_places(torch.ones(len(lengths), longest), real.long(), expected if positioned else None)
    assert torch.equal(places.real_BP, real)
    assert places.starts_BL is None
    given = torch.arange(longest).expand(len(lengths), -1) if places.position_ids is None else places.position_ids
    assert torch.equal(given[real], expected[real])


def test_a_cache_goes_on_counting() -> None:
    past = mask("011", "111").bool()
    places = find_places(torch.ones(2, 2), mask("01111", "11111"), past_BP=past, cached=True)
    assert places.position_ids is not None
    assert places.position_ids.tolist() == [[2, 3], [3, 4]]
    assert places.real_of(2).all()
    assert find_places(torch.ones(2, 2), past_BP=mask("111", "111").bool(), cached=True).position_ids is None


def test_positions_that_restart_are_sequences() -> None:
    places = find_places(torch.ones(2, 4), None, positions("0101", "0012"))
    assert places.starts_BL is not None
    assert Packing(places.real_BP, places.starts_BL).lengths == [2, 2, 1, 3]
    assert places.attention_mask is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"attention_mask": mask("101", "111")}, "holes"),
        ({"attention_mask": mask("1111", "1110"), "past_BP": mask("0", "1").bool()}, "contradicts"),
        ({"past_BP": mask("0", "1").bool()}, "contradicts"),
        ({"attention_mask": mask("1110", "1111"), "past_BP": mask("1", "0").bool()}, "contradicts"),
        ({"attention_mask": mask("1011", "1111"), "past_BP": mask("1", "1").bool()}, "holes"),
        ({"attention_mask": mask("122", "111")}, "other than 0 and 1"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, "4-D"),
        ({"attention_mask": object()}, "kind object"),
        ({"position_ids": positions("024", "012")}, "gaps"),
        ({"position_ids": positions("123", "123")}, "gaps"),
        ({"position_ids": positions("023", "012")}, "gaps"),
        ({"position_ids": positions("012", "012"), "attention_mask": mask("011", "111")}, "an offset"),
        ({"position_ids": positions("012", "012"), "past_BP": mask("1", "1").bool()}, "an offset"),
        ({"position_ids": positions("010", "012"), "cached": True}, "cache"),
        ({"position_ids": positions("010", "012"), "attention_mask": mask("111", "111")}, "mask"),
        ({"position_ids": positions("010", "012"), "keeps_apart": False}, "family"),
    ],
)
def test_what_breaks_the_rule_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(NotSupportedError, match=match):
        find_places(IDS, **arguments)


def test_places_in_a_row_count_only_where_nothing_comes_before_a_sequence() -> None:
    check_counted(find_places(IDS, mask("110", "111")), 3)
    check_counted(find_places(IDS, mask("011", "111")), 4)
    for shifted in (find_places(IDS, mask("011", "111")), find_places(IDS, None, positions("010", "012"))):
        with pytest.raises(NotSupportedError, match="from 3 positions on"):
            check_counted(shifted, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": mask("11", "11")},
        {"position_ids": torch.zeros(3, dtype=torch.long)},
        {"position_ids": torch.zeros(2, 3)},
        {"position_ids": torch.zeros(3, 3, dtype=torch.long)},
        {"past_BP": torch.ones(3, 1, dtype=torch.bool)},
    ],
    ids=["mask", "1-D", "floats", "rows", "cache"],
)
def test_shapes_that_do_not_fit_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        find_places(IDS, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"cu_seq_lens_q": torch.tensor([0, 2, 6])}, {"max_length_k": 3}, {"seq_idx": torch.zeros(1, 6)}, {"seq_idx": 1}],
)
def test_other_descriptions_of_a_packed_row_must_agree(arguments: dict[str, Any]) -> None:
    starts = mask("101000").bool()
    packing = Packing(torch.ones(1, 6, dtype=torch.bool), starts)
    agreeing = {
        "cu_seq_lens_k": torch.tensor([0, 2, 6]),
        "max_length_q": torch.tensor(4),
        "seq_idx": mask("003333"),
    }
    check_packed_arguments(agreeing, packing)
    other = Packing(torch.ones(1, 6, dtype=torch.bool), mask("100100").bool())
    with pytest.raises(NotSupportedError, match="describes other sequences"):
        check_packed_arguments(arguments, other if "max_length_k" not in arguments else packing)


def test_arguments_of_the_loss_are_found() -> None:
    config = tiny_config("llama")
    given = {"num_items_in_batch": 3, "max_length_q": 4, "output_attentions": False, "is_causal": None, "tokenizer": 1}
    assert take_arguments(given, config) == ({"num_items_in_batch": 3}, {"max_length_q": 4})
    config.output_hidden_states = True
    with pytest.raises(NotSupportedError, match="output_hidden_states"):
        take_arguments({}, config)


def test_tokens_are_ids_or_embeddings() -> None:
    table = torch.nn.Embedding(10, 4)
    assert check_tokens(IDS, None, table) is IDS
    assert check_tokens(None, table(IDS), table).shape == (2, 3, 4)
    for ids, embeds in (
        (None, None),
        (IDS, table(IDS)),
        (-IDS, None),
        ([[1]], None),
        (None, torch.ones(1, 1, 4).int()),
    ):
        with pytest.raises(DataError):
            check_tokens(ids, embeds, table)


@pytest.mark.parametrize("keep", [0, 2, torch.tensor([1])])
def test_labels_are_of_the_kept_positions(keep: Any) -> None:
    kept = {0: 3, 2: 2}.get(keep, 1) if isinstance(keep, int) else 1
    check_labels(torch.full((2, kept), -100), None, IDS, keep, 10)
    for labels in (torch.zeros(2, kept + 1).long(), torch.zeros(2, kept), torch.full((2, kept), 10)):
        with pytest.raises(DataError):
            check_labels(labels, None, IDS, keep, 10)


def test_a_cache_is_a_split_models() -> None:
    config = tiny_config("llama")
    own, other = (empty_part(config, Cut(1, 1), "bottom") for _ in range(2))
    cache = SplitCache(own, None, own)  # type: ignore[arg-type]
    assert check_cache(None, own) is None
    assert check_cache(cache, own) is cache
    with pytest.raises(NotSupportedError, match="tuple"):
        check_cache((), own)
    with pytest.raises(NotSupportedError, match="another split model"):
        check_cache(cache, other)


@pytest.mark.parametrize(
    "settings", [{"cache_implementation": "static"}, {"penalty_alpha": 0.5, "top_k": 3}, {"assistant_early_exit": 1}]
)
def test_a_generation_that_reaches_into_blocks_is_refused(settings: dict[str, Any]) -> None:
    check_generation(GenerationConfig(cache_implementation="dynamic", num_beams=2))
    with pytest.raises(IsthmusError) as caught:
        check_generation(GenerationConfig(**settings))
    assert isinstance(caught.value, NotSupportedError)


def test_no_logits_and_no_loss_is_nothing() -> None:
    check_skipped(True, IDS)
    check_skipped(False, None)
    with pytest.raises(DataError, match="needs labels"):
        check_skipped(True, None)
