"""A packed pass of ragged sequences is each sequence by itself through the family's own code.

Shapes: T tokens of all sequences, N of one, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.recipe import LoraSection
from isthmus.trunk.adapter import full_adapter
from isthmus.trunk.attention_kernels import Kernel, Varlen, attend_padded
from isthmus.trunk.runner import Runner
from tests.conftest import targets_of
from tests.oracle.conftest import Models
from tests.oracle.twins import FAMILIES, Tensors, assert_same, distance, random_b
from tests.oracle.varlen import varlen

WIDTH = 32
TOLERANCE = 2e-5
"""The plain part's own rounding is of 1.2e-5, against 64 bits."""
OTHER_ORDER = 5e-5
"""Of what is summed in another order than by the plain part."""
LENGTHS = [3, 40, 1, 23, 17, 16]
"""Below, at and beyond the sliding windows of 16."""
CASES: list[tuple[str, str, Kernel | None]] = [
    *((family, attention, None) for family in FAMILIES for attention in ("sdpa", "eager")),
    *((family, "sdpa", kernel) for family in FAMILIES for kernel in (attend_padded, Varlen(varlen))),
]
CASES = [case for case in CASES if case[:2] != ("gemma2", "sdpa")]  # transformers knows no such pair
"""With a kernel: as on an accelerator, where it computes all sequences of a pass, and the adapters are one batch."""
EXAMPLES = settings(max_examples=8, deadline=None)


@dataclass(frozen=True)
class Pair:
    """The same trunk twice: as the runner runs it, and as transformers does."""

    runner: Runner
    plain: Part
    tolerance: float

    def alone(self, h_ND: torch.Tensor) -> torch.Tensor:
        """One whole sequence through the plain part."""
        return self.plain.hidden(inputs_embeds=h_ND[None], use_cache=False)[0]

    def each_alone(self, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return torch.cat([self.alone(h_ND) for h_ND in torch.split(h_TD, lengths)])


def part_of(folder: Path, family: str, attention: str) -> Part:
    checkpoint = Checkpoint(str(folder))
    checkpoint.config._attn_implementation = attention
    part = load_part(checkpoint, Cut(1, 1), "trunk")
    assert part.config._attn_implementation == attention
    lora = LoraSection(rank=4, targets=tuple(targets_of(family)))
    adapters.add_adapter(part, lora, 0, freeze_a=False)
    adapters.load_adapter(part, random_b(adapters.adapter_of(part)))
    return part


def name_of(case: tuple[str, str, Kernel | None]) -> str:
    return "-".join([*case[:2], *({None: (), attend_padded: ("padded",)}.get(case[2], ("varlen",)))])


@pytest.fixture(scope="module", params=CASES, ids=map(name_of, CASES))
def pair(request: pytest.FixtureRequest, models: Models) -> Pair:
    family, attention, kernel = request.param
    packed, plain = (part_of(models(family), family, attention) for _ in range(2))
    runner = Runner(packed)
    if kernel is not None:
        runner._kernel, runner._groups._at_once = kernel, True
    return Pair(runner, plain, TOLERANCE if kernel is None else OTHER_ORDER)


def hidden(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def grown(part: Part, seed: int) -> Tensors:
    """The part's adapter, moved at random: A too."""
    draw = torch.Generator().manual_seed(seed)
    return {name: one + 0.2 * torch.randn(one.shape, generator=draw) for name, one in adapters.adapter_of(part).items()}


@pytest.mark.parametrize("lengths", [LENGTHS, [40], [23, 23, 23], [1, 1], [1]], ids=str)
def test_a_pass_of_any_lengths_equals_each_sequence_alone(pair: Pair, lengths: list[int]) -> None:
    h_TD = hidden(sum(lengths))
    with torch.no_grad():
        assert distance(pair.runner.full_pass(h_TD, lengths), pair.each_alone(h_TD, lengths)) <= pair.tolerance


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_the_sliding_windows_are_of_consequence(family: str, models: Models) -> None:
    """Otherwise the comparisons would not notice a window that is ignored."""
    narrow, wide = (part_of(models(family, **window), family, "eager") for window in ({}, {"sliding_window": 512}))
    with torch.no_grad():
        near, far = (part.hidden(inputs_embeds=hidden(40)[None], use_cache=False)[0] for part in (narrow, wide))
    assert distance(near[:16], far[:16]) <= TOLERANCE
    assert distance(near[16:], far[16:]) > 1e-2


@pytest.mark.parametrize("lengths", [LENGTHS, [23, 23]], ids=str)
def test_the_gradients_of_a_pass_are_the_sums_of_each_sequences(pair: Pair, lengths: list[int]) -> None:
    """How much the plain part itself rounds, on some processors more than on others, 64 bits tell."""
    h_TD, gradient_TD = hidden(2 * sum(lengths), seed=1).chunk(2)
    exact = Pair(pair.runner, copy.deepcopy(pair.plain), pair.tolerance)
    exact.plain.model.double()
    runs = [
        (pair.runner.part, h_TD, lambda h_TD: pair.runner.full_pass(h_TD, lengths)),
        (pair.plain, h_TD, lambda h_TD: pair.each_alone(h_TD, lengths)),
        (exact.plain, h_TD.double(), lambda h_TD: exact.each_alone(h_TD, lengths)),
    ]
    found = []
    for part, given_TD, run in runs:
        leaf, named = given_TD.clone().requires_grad_(), adapters.trainable(part)
        gradients = torch.autograd.grad(run(leaf), [leaf, *named.values()], gradient_TD.to(given_TD.dtype))
        found.append(dict(zip(["input", *named], gradients, strict=True)))
    got, expected, truth = found
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        bound = max(pair.tolerance, 2 * distance(gradient.double(), truth[name]))
        assert distance(got[name], gradient) <= bound, name


def test_stretches_of_different_adapters_equal_runs_with_each_of_them(pair: Pair) -> None:
    """Two silos' stretches of several sequences, and a third that is the part's own.

    Adapters as large as these can make a part round more than it otherwise does, on some processors more than on
    others; how much, 64 bits tell.
    """
    stretches = [[3, 20], [17, 1, 4], [9]]
    part = pair.runner.part
    own = adapters.adapter_of(part)
    leaves = [{n: one.clone().requires_grad_() for n, one in grown(part, seed).items()} for seed in (1, 2)]
    leaves.append({name: one.clone().requires_grad_() for name, one in own.items()})
    h_TD, gradient_TD = hidden(2 * sum(map(sum, stretches)), seed=2).chunk(2)
    leaf = h_TD.clone().requires_grad_()
    sizes = [sum(lengths) for lengths in stretches]
    grouped = [(size, full_adapter(part, one)) for size, one in zip(sizes, leaves, strict=True)]
    output_TD = pair.runner.full_pass(leaf, [length for lengths in stretches for length in lengths], grouped)
    wanted = [leaf, *[tensor for one in leaves for tensor in one.values()]]
    gradients = iter(torch.autograd.grad(output_TD, wanted, gradient_TD))
    input_gradients = torch.split(next(gradients), sizes)
    for number, (lengths, one) in enumerate(zip(stretches, leaves, strict=True)):
        got = {"output": torch.split(output_TD.detach(), sizes)[number], "input": input_gradients[number]}
        got |= {name: next(gradients) for name in one}
        given = [torch.split(tensor_TD, sizes)[number] for tensor_TD in (h_TD, gradient_TD)]
        plain, exact = copy.deepcopy(pair.plain), copy.deepcopy(pair.plain)
        exact.model.double()
        expected = with_adapter_loaded(plain, one, lengths, *given)
        truth = with_adapter_loaded(exact, one, lengths, *(tensor.double() for tensor in given))
        for name, tensor in expected.items():
            bound = max(pair.tolerance, 2 * distance(tensor.double(), truth[name]))
            assert distance(got[name], tensor) <= bound, name
    assert_same(adapters.adapter_of(part), own, 0.0)


def test_what_one_silo_sends_touches_no_other(pair: Pair) -> None:
    """Not even if it overflows: results and gradients of the others are theirs."""
    stretches = [[3, 20], [17, 1, 4], [9]]
    sizes = [sum(lengths) for lengths in stretches]
    h_TD = hidden(sum(sizes), seed=3)
    bad_TD = torch.cat([h_TD[: sizes[0]], torch.full((sizes[1], WIDTH), float("inf")), h_TD[-sizes[2] :]])
    found = []
    for given_TD in (h_TD, bad_TD):
        leaves = [{n: one.requires_grad_() for n, one in grown(pair.runner.part, seed).items()} for seed in (1, 2, 3)]
        grouped = [(size, full_adapter(pair.runner.part, one)) for size, one in zip(sizes, leaves, strict=True)]
        output_TD = pair.runner.full_pass(given_TD, [length for lengths in stretches for length in lengths], grouped)
        wanted = [tensor for one in leaves for tensor in one.values()]
        gradients = torch.autograd.grad(output_TD, wanted, torch.ones_like(output_TD))
        found.append((torch.split(output_TD.detach(), sizes), torch.stack([g.norm() for g in gradients]).chunk(3)))
    (good, good_gradients), (bad, bad_gradients) = found
    assert not bad[1].isfinite().any()
    for silo in (0, 2):
        assert distance(bad[silo], good[silo]) <= pair.tolerance
        assert distance(bad_gradients[silo], good_gradients[silo]) <= pair.tolerance


def with_adapter_loaded(
    part: Part, adapter: Tensors, lengths: list[int], h_TD: torch.Tensor, gradient_TD: torch.Tensor
) -> Tensors:
    """Output and gradients of a plain part once it holds this adapter."""
    adapters.load_adapter(part, adapter)
    leaf, named = h_TD.clone().requires_grad_(), adapters.adapter_parameters(part)
    alone = [part.hidden(inputs_embeds=h_ND[None], use_cache=False)[0] for h_ND in torch.split(leaf, lengths)]
    output_TD = torch.cat(alone)
    gradients = torch.autograd.grad(output_TD, [leaf, *[named[name] for name in adapter]], gradient_TD)
    return dict(zip(["output", "input", *adapter], [output_TD.detach(), *gradients], strict=True))


@EXAMPLES
@given(data=st.data())
def test_any_partition_into_successive_pieces_equals_the_whole(pair: Pair, data: st.DataObject) -> None:
    """Several sequences, whose pieces come in any order; a pass takes the next piece of some of them."""
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4), label="lengths")
    ahead = [hidden(length, seed) for seed, length in enumerate(lengths)]
    whole = list(ahead)
    behind: list[list[torch.Tensor]] = [[] for _ in lengths]
    caches = [pair.runner.new_cache() for _ in lengths]
    with torch.no_grad():
        while left := [number for number, rest in enumerate(ahead) if len(rest)]:
            chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True), label="chosen")
            sizes = [data.draw(st.integers(1, len(ahead[number])), label="size") for number in chosen]
            h_TD = torch.cat([ahead[number][:size] for number, size in zip(chosen, sizes, strict=True)])
            got_TD = pair.runner.cached_pass(h_TD, sizes, [caches[number] for number in chosen])
            for number, size, piece in zip(chosen, sizes, torch.split(got_TD, sizes), strict=True):
                behind[number].append(piece)
                ahead[number] = ahead[number][size:]
        for h_ND, pieces in zip(whole, behind, strict=True):
            assert distance(torch.cat(pieces), pair.alone(h_ND)) <= pair.tolerance


@EXAMPLES
@given(start=st.integers(1, 40), guessed=st.integers(1, 30), kept=st.integers(0, 30), rest=st.integers(1, 30))
def test_a_cropped_cache_goes_on_as_if_it_had_never_been_longer(
    pair: Pair, start: int, guessed: int, kept: int, rest: int
) -> None:
    """Its copy, too, which shares nothing with it."""
    kept = min(kept, guessed)
    h_ND = hidden(start + guessed + rest)
    first, guess, last = torch.split(h_ND, [start, guessed, rest])
    cache = pair.runner.new_cache()
    with torch.no_grad():
        pair.runner.cached_pass(torch.cat([first, guess]), [start + guessed], [cache])
        twin = cache.copy()
        cache.crop(start + kept)
        got = pair.runner.cached_pass(last, [rest], [cache])
        assert distance(got, pair.alone(torch.cat([first, guess[:kept], last]))[start + kept :]) <= pair.tolerance
        got = pair.runner.cached_pass(last, [rest], [twin])
        assert distance(got, pair.alone(h_ND)[start + guessed :]) <= pair.tolerance


@EXAMPLES
@given(pieces=st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_a_cache_takes_the_bytes_it_foretells(pair: Pair, pieces: list[int]) -> None:
    runner = pair.runner
    cache = runner.new_cache()
    assert cache.nbytes == 0
    with torch.no_grad():
        for size in pieces:
            foretold = cache.bytes_for(cache.length + size)
            runner.cached_pass(hidden(size), [size], [cache])
            assert cache.nbytes == foretold
    assert cache.length == sum(pieces)
