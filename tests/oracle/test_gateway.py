"""What a request gets of the gateway is what ``generate`` gives it alone, whoever shares its passes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from isthmus.gateway.batcher import Batcher
from isthmus.gateway.generation import GenerationRequest
from isthmus.gateway.sampling import SamplingSettings
from isthmus.model.families import FAMILIES
from isthmus.model.split import SplitForCausalLM
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import MULTIMODAL, VOCABULARY, make_recipe
from tests.oracle.conftest import BuildTwins
from tests.oracle.gateway import Collected, batching, written
from tests.oracle.test_bottleneck import SECTIONS
from tests.oracle.test_drafts import draft_for
from tests.oracle.test_generation import crossed
from tests.oracle.test_ropes import CASES, SWITCH, Build, built  # noqa: F401
from tests.oracle.twins import Twins, make_twins

GREEDY = SamplingSettings(temperature=0.0)
LENGTH = 24
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


def random_prompt(length: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (length,), generator=draw).tolist()  # type: ignore[no-any-return]


PROMPTS = [random_prompt(length, seed) for seed, length in enumerate((3, 40, 23, 1, 17, 60))]


def alone(model: SplitForCausalLM, prompt: list[int], length: int = LENGTH, **how: Any) -> list[int]:
    """The answer's tokens by transformers' own ``generate``."""
    ids_1L = torch.tensor([prompt])
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | how
    output = model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), **options)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def greedy(prompt: list[int], length: int = LENGTH, **how: Any) -> GenerationRequest:
    return GenerationRequest(prompt, length, settings=GREEDY, **how)


def answers(batcher: Batcher, requests: list[GenerationRequest]) -> list[list[int]]:
    return [one.ids[0] for one in written(batcher, requests)]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MULTIMODAL.keys()))
def test_greedy_answers_of_each_family(family: str, twins_of: BuildTwins) -> None:
    model = twins_of(family, (2, 2)).split
    with batching(model) as batcher:
        assert answers(batcher, list(map(greedy, PROMPTS))) == [alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("boundary", [{"tail": 4}, *SECTIONS.values()], ids=["tail", *SECTIONS])
def test_whatever_crosses(boundary: dict[str, Any], twins_of: BuildTwins) -> None:
    twins = twins_of("qwen3", (2, 1), sections={"boundary": boundary})
    with batching(twins.split) as batcher:
        before = crossed(twins)
        found = answers(batcher, list(map(greedy, PROMPTS)))
        packed = crossed(twins)[len(before) :]
    assert found == [alone(twins.split, prompt) for prompt in PROMPTS]
    assert sorted(packed) == sorted(crossed(twins)[len(before) + len(packed) :])


@pytest.mark.parametrize("answers_each", [1, 3])
def test_attention_that_turns_away(answers_each: int, twins_of: BuildTwins, tmp_path: Path) -> None:
    finder = tmp_path / "mine.py"
    finder.write_text(
        'import re\ndef find(text):\n    return [(*m.span(), "high") for m in re.finditer(r"w[2-5]\\d", text)]\n'
    )
    section = {"function": f"{finder}:find", "attention": 4.0, "classes": {"high": {"noise": 3.0}}}
    twins = twins_of("llama", (2, 1), sections={"sensitivity": section})
    with batching(twins.split) as batcher:
        found = written(batcher, [greedy(prompt, answers=answers_each) for prompt in PROMPTS])
    expected = [alone(twins.split, prompt) for prompt in PROMPTS]
    assert [one.ids for one in found] == [[ids] * answers_each for ids in expected]
    twins.split.shield = None
    assert expected != [alone(twins.split, prompt) for prompt in PROMPTS], "nothing was turned away from"


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("drafting", [False, True])
def test_ropes_that_look_at_lengths(family: str, kind: str, drafting: bool, built: Build) -> None:  # noqa: F811
    """Answers go beyond the switch, some prompts too; where the family drops its cache, several answers are one."""
    model = built(family, kind).split
    prompts = [random_prompt(length, length) for length in (SWITCH - 5, 3, SWITCH, SWITCH + 9, SWITCH - 1)]
    with batching(model, draft=draft_for(model) if drafting else None) as batcher:
        assert answers(batcher, list(map(greedy, prompts))) == [alone(model, prompt) for prompt in prompts]
        (several,) = written(batcher, [greedy(prompts[0], answers=2)])
    assert several.ids == [alone(model, prompts[0])] * 2


@pytest.mark.skipif(not STORIES.exists(), reason=f"no model at {STORIES}")
def test_sixteen_stories_at_once(tmp_path: Path) -> None:
    """A real model, whose likeliest tokens are often close: whoever shares its passes, it writes the same."""
    twins = make_twins(make_recipe(STORIES, lora={"targets": ["q_proj", "v_proj"]}), tmp_path, moved=False)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    names = ("Lily", "Tom", "Sue", "Ben", "Mia", "Max", "Anna", "Sam")
    texts = [f"Once upon a time, {name} {what}" for name in names for what in ("had a red ball.", "was very sad. One")]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    with batching(twins.split) as batcher:
        found = answers(batcher, [greedy(prompt, 80) for prompt in prompts])
    assert found == [alone(twins.split, prompt, 80) for prompt in prompts]
    twins.close()


@pytest.fixture
def llama(twins_of: BuildTwins) -> Twins:
    return twins_of("llama", (2, 1))


@pytest.mark.parametrize(
    ("asked", "how"),
    [
        ({}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"top_p": 0.8}, {"top_p": 0.8}),
        ({"temperature": 1.3, "top_p": 0.6}, {"temperature": 1.3, "top_p": 0.6}),
    ],
)
@pytest.mark.parametrize("drafting", [False, True])
def test_seeded_samples_are_those_of_generate(
    asked: dict[str, Any], how: dict[str, Any], drafting: bool, llama: Twins
) -> None:
    """Among others, with drafts, or alone: the generator is the request's own."""
    expected = []
    for seed, prompt in enumerate(PROMPTS):
        torch.manual_seed(seed)
        expected.append(alone(llama.split, prompt, do_sample=True, top_k=0, **how))
    requests = [
        GenerationRequest(prompt, LENGTH, settings=SamplingSettings(seed=seed, **asked))
        for seed, prompt in enumerate(PROMPTS)
    ]
    with batching(llama.split, draft=draft_for(llama.split) if drafting else None) as batcher:
        assert [one.ids[0] for one in written(batcher, requests)] == expected
        assert [written(batcher, [one])[0].ids[0] for one in requests] == expected


def test_several_answers_cost_one_prompt(llama: Twins) -> None:
    """Each draws by itself: the first as it would alone, and the others otherwise."""
    request = GenerationRequest(PROMPTS[1], LENGTH, answers=4, settings=SamplingSettings(seed=3))
    single = GenerationRequest(PROMPTS[1], LENGTH, settings=SamplingSettings(seed=3))
    with batching(llama.split) as batcher:
        before = len(crossed(llama))
        several, again, one = (written(batcher, [each])[0] for each in (request, request, single))
    assert several.ids == again.ids
    assert several.ids[0] == one.ids[0]
    assert len({tuple(ids) for ids in several.ids}) == 4
    assert crossed(llama)[before : before + LENGTH] == [len(PROMPTS[1]), *[4] * (LENGTH - 1)]
    assert several.end is not None
    assert (len(several.end.releases), several.end.written) == (LENGTH, 4 * LENGTH)


def test_answers_that_end_leave_the_others_as_they_were(llama: Twins) -> None:
    ids = alone(llama.split, PROMPTS[2])
    request = GenerationRequest(PROMPTS[2], LENGTH, answers=5, settings=SamplingSettings(seed=8))
    ending = GenerationRequest(PROMPTS[2], LENGTH, answers=5, settings=SamplingSettings(seed=8), ends=set(range(4, 12)))
    with batching(llama.split) as batcher:
        whole, ended = written(batcher, [request])[0], written(batcher, [ending])[0]
        short = written(batcher, [greedy(PROMPTS[2], ends=[ids[5]])])[0]
    first = [next((at for at, token in enumerate(own) if token in ending.ends), LENGTH) for own in whole.ids]
    assert len(set(first)) > 2
    assert ended.ids == [own[:at] for own, at in zip(whole.ids, first, strict=True)]
    assert ended.finishes == ["length" if at == LENGTH else "stop" for at in first]
    assert (short.ids[0], short.finishes) == (ids[: ids.index(ids[5])], ["stop"])


def test_drafts_change_nothing_but_the_trips(llama: Twins) -> None:
    repeated = [prompt * 3 for prompt in PROMPTS[:3]]
    expected = [alone(llama.split, prompt) for prompt in repeated]
    with batching(llama.split, draft=draft_for(llama.split)) as batcher:
        assert answers(batcher, list(map(greedy, repeated))) == expected
        before = len(crossed(llama))
        assert answers(batcher, list(map(greedy, repeated[:1]))) == expected[:1]
        sent = crossed(llama)[before:]
    assert max(sent[1:]) > 1
    assert sum(sent) > len(repeated[0]) + LENGTH - 1, "no guess was wrong: nothing had to be forgotten"


@given(
    mix=st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 30), st.integers(0, 3), st.integers(0, 40)),
        min_size=2,
        max_size=16,
    ),
    together=st.integers(1, 16),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_comes_when_changes_nothing(mix: list[tuple[int, int, int, int]], together: int, llama: Twins) -> None:
    """Prompts and answers of any length, greedy or drawn, one or several, that arrive at any time."""
    requests = [
        GenerationRequest(
            random_prompt(length, seed),
            longest,
            answers=max(1, min(several, together)),
            settings=GREEDY if seed % 2 else SamplingSettings(seed=seed, top_p=0.9),
        )
        for length, longest, several, seed in mix
    ]
    with batching(llama.split, together=together) as batcher:
        expected = [written(batcher, [one])[0].ids for one in requests]
        sinks = []
        for number, one in enumerate(requests):
            sinks.append(Collected())
            batcher.submit(one, sinks[-1])
            time.sleep(0.003 * (number % 3))
        for sink in sinks:
            assert sink.wait().error is None
    assert [sink.ids for sink in sinks] == expected


def test_a_session_that_the_trunk_lost_is_sent_again(llama: Twins) -> None:
    """While others share its passes; nothing is charged twice."""
    expected = [alone(llama.split, prompt, 60) for prompt in PROMPTS]
    sinks = [Collected() for _ in PROMPTS]
    with batching(llama.split) as batcher:
        before = len(crossed(llama))
        running = [batcher.submit(greedy(prompt, 60), sink) for prompt, sink in zip(PROMPTS, sinks, strict=True)]
        assert all(sink.begun.wait(60) for sink in sinks)
        session = running[2].session
        assert session is not None
        llama.remote.channel.submit(pb.Close(session=session.id)).result()
        assert [sink.wait().error for sink in sinks] == [None] * len(sinks)
    assert [sink.ids[0] for sink in sinks] == expected
    assert len(crossed(llama)) - before == 60 * len(PROMPTS)
