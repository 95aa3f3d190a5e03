"""Rope kinds that look at a sequence's length: the split model gives each row what the uncut model gives it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from isthmus.errors import NotSupportedError
from isthmus.model import adapters
from isthmus.model.split import SplitForCausalLM
from isthmus.recipe import Recipe
from isthmus.silo.join import join
from tests.conftest import make_recipe, targets_of
from tests.oracle.ropes import SWITCH, FirstState, save_roped_model
from tests.oracle.test_drafts import draft_for
from tests.oracle.test_generation import crossed, generate
from tests.oracle.twins import Inputs, Twins, assert_same, distance, loopback, lora_of, make_twins, prompts, ragged

CASES = (("phi3", "longrope"), ("llama", "longrope"), ("llama", "dynamic"))
LENGTHS = (3, 40, SWITCH, SWITCH + 1, 12)
TOLERANCE = 5e-5
"""Of logits: what sums of other orders (chunks, masks, several tokens at a time) differ by in these models."""
ANSWER = 18
Build = Callable[..., "Case"]


@dataclass(frozen=True)
class Case:
    """Twins of one family and kind of rope; the uncut one is asked in its first state."""

    twins: Twins
    recipe: Recipe
    first_state: FirstState

    @property
    def split(self) -> SplitForCausalLM:
        return self.twins.split

    def alone(self, **inputs: Any) -> Any:
        self.first_state.restore()
        return self.twins.whole(**inputs)

    def generated(self, ids_L: torch.Tensor, length: int = ANSWER, **settings: Any) -> Any:
        self.first_state.restore()
        inputs = {"input_ids": ids_L[None], "attention_mask": torch.ones_like(ids_L)[None]}
        return generate(self.twins.whole, inputs, length, do_sample=False, **settings)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    folders: dict[tuple[str, str], Path] = {}
    twins: list[Twins] = []

    def build(family: str, kind: str, **sections: Any) -> Case:
        if (family, kind) not in folders:
            folders[family, kind] = save_roped_model(family, kind, tmp_path_factory.mktemp("model"))
        settings = {"trunk": {"chunk": 16}, "model": {"bottom": 1, "top": 2}, **sections}
        settings["lora"] = {"targets": targets_of(family), **settings.get("lora", {})}
        recipe = make_recipe(folders[family, kind], **settings)
        twins.append(make_twins(recipe, tmp_path_factory.mktemp("trunk"), ends_train_a=True))
        return Case(twins[-1], recipe, FirstState(twins[-1].whole))

    yield build
    for one in twins:
        one.close()


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request: pytest.FixtureRequest, built: Build) -> Case:
    return built(*request.param)


def rows_of(batch: Inputs) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each row's number, mask and token ids."""
    for row, real_L in enumerate(batch["attention_mask"].bool()):
        yield row, real_L, batch["input_ids"][row][real_L]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("without", [(), ("position_ids",)], ids=["positions", "mask"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_a_row_of_a_batch_has_its_own_length(case: Case, side: str, without: tuple[str, ...], use_cache: bool) -> None:
    batch = {key: one for key, one in ragged(side, lengths=LENGTHS).items() if key not in ("labels", *without)}
    logits = case.split(**batch, use_cache=use_cache).logits
    for row, real_L, ids_L in rows_of(batch):
        assert distance(logits[row][real_L], case.alone(input_ids=ids_L[None]).logits[0]) <= TOLERANCE


@torch.no_grad()
def test_sequences_packed_into_a_row_have_each_its_own_length(case: Case) -> None:
    ids_L = torch.cat([ids_L for _, _, ids_L in rows_of(ragged("right", lengths=LENGTHS))])
    positions_L = torch.cat([torch.arange(length) for length in LENGTHS])
    logits = case.split(input_ids=ids_L[None], position_ids=positions_L[None], use_cache=False).logits[0]
    pieces = (torch.split(one, list(LENGTHS)) for one in (ids_L, logits))
    for own_L, got in zip(*pieces, strict=True):
        assert distance(got, case.alone(input_ids=own_L[None]).logits[0]) <= TOLERANCE


@torch.no_grad()
def test_rows_of_one_length_are_the_uncut_models_bit_for_bit(built: Build) -> None:
    for family, kind in CASES:
        case = built(family, kind, trunk={"chunk": 512})
        for length in (SWITCH, SWITCH + 1, 40):
            batch = ragged("left", lengths=(length,) * 3)
            assert torch.equal(case.split(**batch).logits, case.alone(**batch).logits)


def test_losses_and_gradients_are_those_of_the_rows_alone(case: Case) -> None:
    """One row is longer than the switch, the others are not."""
    batch = ragged("left", lengths=LENGTHS[1:])
    supervised = int((batch["labels"][:, 1:] >= 0).sum())
    for model in case.twins.both:
        model.zero_grad()
    case.twins.service._training.forget("a")
    loss = case.split(**batch).loss
    loss.backward()
    losses = []
    for row, real_L, ids_L in rows_of(batch):
        labels_1L = batch["labels"][row][real_L][None]
        losses.append(case.alone(input_ids=ids_L[None], labels=labels_1L, num_items_in_batch=supervised).loss)
        losses[-1].backward()
    assert distance(loss.detach(), torch.stack(losses).sum().detach()) <= 1e-5
    expected = {name: parameter.grad for name, parameter in lora_of(case.twins.whole).items()}
    assert_same(case.twins.split_gradients(), expected, 5e-5)


@pytest.mark.parametrize("length", [5, 30])
def test_generation_across_the_switch(case: Case, length: int) -> None:
    """Plain, with drafts, and with beams; the prompt of 30 reaches the trunk in chunks."""
    inputs = prompts((length,))
    settings = {"output_logits": True, "return_dict_in_generate": True}
    expected = case.generated(inputs["input_ids"][0], **settings)
    draft = draft_for(case.split)
    for way in ({}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": draft}, {"assistant_model": case.twins.whole}):
        split = generate(case.split, inputs, ANSWER, do_sample=False, **settings, **way)
        assert torch.equal(split.sequences, expected.sequences)
        pairs = zip(split.logits, expected.logits, strict=True)
        assert max(distance(*pair) for pair in pairs) <= TOLERANCE
    beams = generate(case.split, inputs, ANSWER, num_beams=3, do_sample=False)
    assert torch.equal(beams, case.generated(inputs["input_ids"][0], num_beams=3))


@pytest.mark.parametrize(("family", "kind"), [("gemma3_text", "dynamic"), ("olmo3", "longrope")])
def test_ropes_of_layer_types(family: str, kind: str, built: Build) -> None:
    """Bottom has no block of full attention, whose rope alone looks at lengths."""
    case = built(family, kind)
    batch = ragged("left", lengths=LENGTHS)
    with torch.no_grad():
        logits = case.split(**batch).logits
        for row, real_L, ids_L in rows_of(batch):
            assert distance(logits[row][real_L], case.alone(input_ids=ids_L[None]).logits[0]) <= TOLERANCE
    inputs = prompts((12,))
    for way in ({}, {"prompt_lookup_num_tokens": 4}):
        split = generate(case.split, inputs, ANSWER, do_sample=False, **way)
        assert torch.equal(split, case.generated(inputs["input_ids"][0]))


def test_rows_that_cross_the_switch_at_different_times(case: Case) -> None:
    batch = prompts((5, 12, 30))
    split = generate(case.split, batch, ANSWER, do_sample=False)
    for row, _, ids_L in rows_of(batch):
        assert torch.equal(split[row, -ANSWER:], case.generated(ids_L)[0, -ANSWER:])


@pytest.mark.parametrize("chunk", [5, 20])
def test_a_prompt_that_the_caller_gives_in_chunks(case: Case, chunk: int) -> None:
    """Each call is what it is in the uncut model: the length at its end decides."""
    inputs = prompts((33,))
    split = generate(case.split, inputs, ANSWER, do_sample=False, prefill_chunk_size=chunk)
    assert torch.equal(split, case.generated(inputs["input_ids"][0], prefill_chunk_size=chunk))


@torch.no_grad()
def test_calls_with_a_cache_are_those_of_the_uncut_model(case: Case) -> None:
    ids_1L = prompts((50,))["input_ids"]
    cache = case.split.new_cache()
    known: Any = None
    for piece_1L in torch.split(ids_1L, [9, 1, 12, 1, 27], dim=1):
        split = case.split(piece_1L, past_key_values=cache)
        whole = case.alone(input_ids=piece_1L, past_key_values=known, use_cache=True)
        known = whole.past_key_values
        assert distance(split.logits, whole.logits) <= TOLERANCE


def test_all_positions_are_released_again_where_the_family_drops_its_cache(built: Build) -> None:
    for family, kind in CASES:
        case = built(family, kind)
        before = len(crossed(case.twins))
        generate(case.split, prompts((SWITCH - 2,)), 6, do_sample=False)
        again = SWITCH + 1 if family == "phi3" else 1
        assert crossed(case.twins)[before:] == [SWITCH - 2, 1, 1, again, 1, 1]


def test_a_conversation_goes_on_with_its_cache(case: Case) -> None:
    """Its second turn crosses the switch."""
    settings = {"do_sample": False, "return_dict_in_generate": True}
    case.first_state.restore()
    answers = []
    for model in case.twins.both:
        inputs = prompts((7,))
        first = generate(model, inputs, 5, **settings)
        ids_1L = torch.cat([first.sequences, prompts((8,), seed=1)["input_ids"]], dim=1)
        inputs = {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}
        answers.append(generate(model, inputs, 5, past_key_values=first.past_key_values, **settings).sequences)
    assert torch.equal(*answers)


def test_ensembles_with_an_assistant_are_refused(case: Case) -> None:
    drafts = {"assistant_model": case.twins.whole, "assistant_ensemble_weight": 0.2}
    with pytest.raises(NotSupportedError, match="assistant_ensemble_weight"):
        generate(case.split, prompts((5,)), 3, do_sample=False, **drafts)


class Loses(LogitsProcessor):
    """Makes the trunk forget all sessions after every token."""

    def __init__(self, twins: Twins) -> None:
        self._sessions = twins.service._sessions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._sessions._sessions.clear()
        return scores


@pytest.mark.parametrize("way", [{}, {"prompt_lookup_num_tokens": 4}], ids=["plain", "lookup"])
def test_replayed_frames_give_the_same_numbers(case: Case, way: dict[str, Any]) -> None:
    inputs = prompts((12,))
    split = generate(case.split, inputs, 12, logits_processor=LogitsProcessorList([Loses(case.twins)]), **way)
    assert torch.equal(split, case.generated(inputs["input_ids"][0], 12))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_silos_of_different_lengths_share_passes(family: str, kind: str, built: Build) -> None:
    """Two silos generate at the same time, one beyond the switch, one below."""
    case = built(family, kind, silos=("a", "b"))
    other = join(case.recipe, "b", channel=loopback(case.twins.service, "b", case.recipe)).model
    tensors = case.twins.split_adapter()
    for part in other.ends:
        adapters.load_adapter(part, tensors)
    asked = ((case.split, prompts((40,), seed=1)), (other, prompts((4,), seed=2)))
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(generate, *one, 10, do_sample=False) for one in asked]
    for (_, inputs), got in zip(asked, found, strict=True):
        assert torch.equal(got.result(), case.generated(inputs["input_ids"][0], 10))


@torch.no_grad()
def test_examples_released_once_have_their_own_length(built: Build) -> None:
    for family, kind in CASES:
        once = {"lora": {"freeze_bottom": True}, "boundary": {"release_once": True}}
        case = built(family, kind, **once)
        batch = ragged("left", lengths=LENGTHS)
        for _ in range(2):
            logits = case.split(**batch).logits
            for row, real_L, ids_L in rows_of(batch):
                assert distance(logits[row][real_L], case.alone(input_ids=ids_L[None]).logits[0]) <= TOLERANCE
