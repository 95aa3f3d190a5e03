"""Rows of several sequences, and of padding: the split model trains and scores as the uncut one, for any mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from isthmus.data.tokens import IGNORED
from isthmus.errors import NotSupportedError
from isthmus.model import adapters
from isthmus.model.families import FAMILIES
from tests.conftest import VOCABULARY
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Inputs, Twins, assert_same, distance, lora_of, padded

Text = tuple[list[int], list[int]]
SLIDING = ("llama", "qwen3")
"""Full attention, and sliding windows of 16 in some of the blocks."""


@pytest.fixture(scope="module", params=SLIDING)
def twins(request: pytest.FixtureRequest, build: BuildTwins) -> Iterator[Twins]:
    made = build(request.param, (1, 2), ends_train_a=True)
    yield made
    made.close()


def texts_of(lengths: list[int], seed: int) -> list[Text]:
    """Random sequences; about half of the tokens have a label, the first never."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(4, VOCABULARY, (length,), generator=draw)
        labels = torch.where(torch.rand(length, generator=draw) < 0.5, IGNORED, ids)
        labels[0] = IGNORED
        labels[-1:] = ids[-1:] if length > 1 else IGNORED
        found.append((ids.tolist(), labels.tolist()))
    return found


def packed(texts: list[Text]) -> Inputs:
    """All sequences in one row, as transformers' collator makes it."""
    features = [{"input_ids": ids, "labels": labels} for ids, labels in texts]
    batch: Inputs = DataCollatorWithFlattening(return_tensors="pt")(features)
    return batch


def loss_and_gradients(twins: Twins, batch: Inputs) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Compare all gradients; the two losses and the lengths that crossed."""
    seen: list[int] = []
    send = twins.remote.send

    def noted(outbound: Any, **how: Any) -> Any:
        seen.extend(outbound.lengths)
        return send(outbound, **how)

    twins.service._training.forget("a")
    twins.remote.send = noted  # type: ignore[method-assign]
    losses = []
    for model in twins.both:
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    del twins.remote.send
    whole = {name: parameter.grad for name, parameter in lora_of(twins.whole).items()}
    assert_same(twins.split_gradients(), {name: one for name, one in whole.items() if one is not None}, 2e-5)
    return losses[0], losses[1], seen


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5).filter(lambda lengths: max(lengths) > 1),
    st.sampled_from(("left", "right", "packed")),
    st.integers(0, 99),
)
def test_loss_and_gradients_of_any_batch(twins: Twins, lengths: list[int], layout: str, seed: int) -> None:
    texts = texts_of(lengths, seed)
    batch = packed(texts) if layout == "packed" else padded(texts, layout)
    split, whole, crossed = loss_and_gradients(twins, batch)
    assert distance(split, whole) <= 1e-6
    assert crossed == lengths


@pytest.mark.parametrize("multiple", [None, 8])
def test_rows_of_trls_collator(twins: Twins, multiple: int | None) -> None:
    """With all that it adds for flash attention; filled up with tokens that are sequences of their own."""
    texts = texts_of([9, 21, 4], 5)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)
    batch = collator([{"input_ids": ids} for ids, _ in texts])
    assert {"cu_seq_lens_q", "max_length_q", "seq_idx"} < set(batch)
    split, whole, crossed = loss_and_gradients(twins, batch)
    assert distance(split, whole) <= 1e-6
    assert crossed == [9, 21, 4] + ([] if multiple is None else [1] * 6)


def test_packed_sequences_have_the_loss_of_rows_of_their_own(twins: Twins) -> None:
    texts = texts_of([9, 21, 4], 5)
    one, _, _ = loss_and_gradients(twins, packed(texts))
    many, _, _ = loss_and_gradients(twins, padded(texts, "left"))
    assert distance(one, many) <= 1e-6


def test_each_packed_sequence_is_a_record_of_its_own(twins: Twins) -> None:
    texts = texts_of([9, 21, 4], 6)
    subjects = twins.boundary.records.subjects([ids for ids, _ in texts], [9, 21, 4])
    twins.split(**packed(texts), use_cache=False)
    release = list(twins.boundary.ledger.history())[-1]
    assert {charge.record for charge in release.charges} == set(subjects.records)


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.uncut_backbone])
def test_every_family_keeps_packed_sequences_apart_or_refuses_them(family: str, twins_of: BuildTwins) -> None:
    twins = twins_of(family, (1, 2), ends_train_a=True)
    batch = packed(texts_of([9, 21, 4], 7))
    if FAMILIES[family].keeps_apart:
        split, whole, crossed = loss_and_gradients(twins, batch)
        assert distance(split, whole) <= 1e-6
        assert crossed == [9, 21, 4]
    else:
        with pytest.raises(NotSupportedError, match="attends across"):
            twins.split(**batch, use_cache=False)
        with torch.no_grad():
            whole = twins.whole(**batch, use_cache=False).logits[0, 9:30]
            alone = twins.whole(input_ids=batch["input_ids"][:, 9:30]).logits[0]
        assert distance(whole, alone) > 1e-3


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"boundary": {"residual": True}}, id="residual"),
        pytest.param({"boundary": {"release_once": True}, "lora": {"freeze_bottom": True}}, id="release-once"),
        pytest.param(
            {"boundary": {"release_once": True, "residual": True}, "lora": {"freeze_bottom": True}}, id="once-residual"
        ),
    ],
)
def test_options_compute_packed_sequences_as_rows_of_their_own(sections: dict[str, Any], twins_of: BuildTwins) -> None:
    twins, texts = twins_of("llama", (1, 2), sections=sections), texts_of([9, 21, 4], 8)
    found = []
    for batch in (packed(texts), padded(texts, "right"), packed(texts)):
        twins.service._training.forget("a")
        twins.split.zero_grad()
        loss = twins.split(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {name: one.clone() for name, one in twins.split_gradients().items()}))
    for loss, gradients in found[1:]:
        assert distance(loss, found[0][0]) <= 1e-6
        assert_same(gradients, found[0][1], 1e-4)


def test_the_guard_sees_packed_sequences_as_rows_of_their_own(build: BuildTwins) -> None:
    noised = {"clip": 2.0, "noise": 1e-6}
    defence = {"answer": 1.0, "inverter": 1.0, "correlation": 1.0}
    sections = {"boundary": {"defence": defence, "residual": True, "forward": noised}}
    texts, found = texts_of([9, 21, 4], 8), []
    for batch in (packed(texts), padded(texts, "right")):
        twins = build("llama", (1, 2), sections=sections, ends_train_a=True)
        twins.split(**batch, use_cache=False).loss.backward()
        gradients = {name: one.grad for name, one in adapters.trainable(twins.split.bottom).items()}
        found.append((twins.split.guard.last_terms, {name: one for name, one in gradients.items() if one is not None}))
        twins.close()
    assert found[0][0].answer == pytest.approx(found[1][0].answer, rel=1e-3)
    assert_same(found[0][1], found[1][1], 1e-3)


@pytest.mark.parametrize(
    ("sections", "option"),
    [
        ({"boundary": {"tail": 3}}, "boundary.tail"),
        ({"sensitivity": {"attention": 1.0}}, "sensitivity.attention"),
    ],
)
def test_options_of_one_sequence_a_row_refuse_packed_ones(
    sections: dict[str, Any], option: str, twins_of: BuildTwins
) -> None:
    twins = twins_of("llama", (1, 2), sections=sections)
    with pytest.raises(NotSupportedError, match=option):
        twins.split(**packed(texts_of([9, 4], 9)), use_cache=False)
