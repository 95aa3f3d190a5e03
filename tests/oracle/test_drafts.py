"""Drafts made within the silo: greedy tokens stay those of plain decoding, whatever the drafts are worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.data.tokens import Tokens
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting import distil, draft_file
from isthmus.silo.drafting.bridge import Bridge
from isthmus.silo.drafting.draft import HOPE, Draft
from isthmus.silo.drafting.draft_length import Costs, DraftLength, Share
from tests.conftest import VOCABULARY
from tests.oracle.conftest import BuildTwins
from tests.oracle.test_generation import CACHES, crossed, generate
from tests.oracle.twins import Inputs, Twins, distance, prompts

LENGTH = 60
WORDS = torch.arange(VOCABULARY)


class FarAway(DraftLength):
    """A trip so long that any guess pays."""

    @property
    def costs(self) -> Costs:
        return Costs(1e3, 0.0, 0.0)


def draft_for(model: SplitForCausalLM, bridge: Bridge | None = None, *, far: bool = True) -> Draft:
    torch.manual_seed(0)
    draft = Draft(model, bridge or Bridge(model.bottom), WORDS)
    draft.draft_length = FarAway() if far else draft.draft_length
    return draft


def trained(model: SplitForCausalLM, inputs: Inputs, *, steps: int) -> Bridge:
    """A bridge that has seen these prompts' answers this often."""
    rows = [Tokens(ids.tolist(), []) for ids in inputs["input_ids"]]
    records = list(distil.answers(model, rows, 0, longest=LENGTH))
    torch.manual_seed(0)
    bridge = Bridge(model.bottom)
    distil.train_bridge(bridge, model.top, WORDS, records, epochs=steps, batch=4, learning_rate=3e-3)
    return bridge


@pytest.fixture
def llama(twins_of: BuildTwins) -> Iterator[Twins]:
    return twins_of("llama", (1, 2))


@pytest.mark.parametrize("family", CACHES)
@pytest.mark.parametrize("steps", [0, 40])
def test_tokens_of_plain_decoding(family: str, steps: int, twins_of: BuildTwins) -> None:
    twins, inputs = twins_of(family, (2, 1)), prompts((21,))
    bridge = trained(twins.split, inputs, steps=steps) if steps else None
    draft = draft_for(twins.split, bridge)
    before = len(crossed(twins))
    split = generate(twins.split, inputs, LENGTH, assistant_model=draft, do_sample=False)
    assert torch.equal(split, generate(twins.whole, inputs, LENGTH, do_sample=False))
    sent = crossed(twins)[before:]
    assert max(sent[1:]) > 1
    assert sum(sent) > 21 + LENGTH, "no guess was wrong: nothing had to be forgotten"
    assert any(share.tried > 4 for name, share in draft.sources.shares.items() if name.startswith("bridge ")), (
        "not asked"
    )


def test_a_trained_bridge_brings_several_tokens_a_trip(llama: Twins) -> None:
    inputs = prompts((21,))
    draft = draft_for(llama.split, trained(llama.split, inputs, steps=300))
    before = len(crossed(llama))
    split = generate(llama.split, inputs, LENGTH, assistant_model=draft, do_sample=False)
    assert torch.equal(split, generate(llama.whole, inputs, LENGTH, do_sample=False))
    assert len(crossed(llama)) - before < LENGTH / 2


def test_caches_and_tape_after_rejected_drafts(llama: Twins) -> None:
    """They hold what plain decoding would have left there."""
    model, inputs = llama.split, prompts((21,))
    out = generate(
        model, inputs, LENGTH, assistant_model=draft_for(model), do_sample=False, return_dict_in_generate=True
    )
    cache, ids = out.past_key_values, out.sequences
    assert cache.get_seq_length() == len(cache.transcript) == ids.shape[1] - 1
    with torch.no_grad():
        fresh = model.new_cache()
        transcript = fresh.start_transcript()
        whole = model(ids, past_key_values=fresh)
        continued = model(ids[:, -1:], past_key_values=cache)
    assert distance(continued.logits[:, -1], whole.logits[:, -1]) < 1e-4
    assert distance(cache.transcript.slice().g_BLD, transcript.slice().g_BLD) < 1e-4


def test_a_bad_bridge_costs_no_trip_that_lookup_saves(llama: Twins) -> None:
    inputs = {key: value.repeat(1, 3) for key, value in prompts((9,)).items()}
    trips = {}
    ways = {
        "lookup": draft_for(llama.split),
        "both": draft_for(llama.split),
    }
    for name, share in ways["lookup"].sources.shares.items():
        if name.startswith(HOPE):
            ways["lookup"].sources.shares[name] = Share(0.0, share.tried)
    for name, draft in ways.items():
        before = len(crossed(llama))
        generate(llama.split, inputs, LENGTH, assistant_model=draft, do_sample=False)
        trips[name] = len(crossed(llama)) - before
    assert trips["both"] <= trips["lookup"]


def test_sampling_from_one_token_is_greedy(llama: Twins) -> None:
    settings = {"do_sample": True, "top_k": 1}
    split = generate(llama.split, prompts((21,)), LENGTH, assistant_model=draft_for(llama.split), **settings)
    assert torch.equal(split, generate(llama.whole, prompts((21,)), LENGTH, do_sample=False))


def test_padded_prompts_are_drafted_by_looking_up(llama: Twins) -> None:
    inputs = prompts((12,))
    padded = {key: torch.nn.functional.pad(value, (5, 0)) for key, value in inputs.items()}
    split = generate(llama.split, padded, LENGTH, assistant_model=draft_for(llama.split), do_sample=False)
    assert torch.equal(split, generate(llama.whole, padded, LENGTH, do_sample=False))


def test_the_measured_pace_is_used(llama: Twins) -> None:
    draft = draft_for(llama.split, far=False)
    split = generate(llama.split, prompts((21,)), LENGTH, assistant_model=draft, do_sample=False)
    assert torch.equal(split, generate(llama.whole, prompts((21,)), LENGTH, do_sample=False))
    assert draft.draft_length.costs.round_trip + draft.draft_length.costs.verified > 0


def test_a_saved_draft_drafts_the_same(llama: Twins, tmp_path: Path) -> None:
    inputs = prompts((21,))
    draft, frames = draft_for(llama.split, trained(llama.split, inputs, steps=40)), []
    corpus = [(inputs["input_ids"][0].tolist(), 3)]
    draft_file.save(tmp_path / draft_file.NAME, draft, corpus)
    loaded = [draft_file.load(tmp_path / draft_file.NAME, llama.split) for _ in range(2)]
    for one in loaded:
        one.draft_length = FarAway()
        before = len(crossed(llama))
        generate(llama.split, inputs, LENGTH, assistant_model=one, do_sample=False)
        frames.append(crossed(llama)[before:])
    assert frames[0] == frames[1]
    for name, tensor in draft.trunk.state_dict().items():
        assert torch.equal(tensor, loaded[0].trunk.state_dict()[name])
    assert loaded[0].corpus.find(corpus[0][0][:6]) == (corpus[0][0][6], 4)
