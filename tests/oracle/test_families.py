"""What a family must pass before its row is accepted: at every cut, the split model is the uncut model.

The checks are few and sharp, so that they stay affordable for every family. ``test_forward``, ``test_generation`` and
``test_packed`` ask more of the families in ``twins.FAMILIES``.

Shapes: T tokens of all sequences, N of one, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.model.families import FAMILIES as ROWS
from isthmus.recipe import LoraSection
from isthmus.silo.join import join
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.adapter import full_adapter
from isthmus.trunk.attention_kernels import attend_padded
from isthmus.trunk.runner import Runner
from isthmus.trunk.service import TrunkService
from tests.conftest import MULTIMODAL, make_recipe, targets_of, uncut
from tests.oracle.conftest import BuildTwins, Models
from tests.oracle.twins import (
    CUTS,
    FAMILIES,
    Tensors,
    Twins,
    assert_same,
    distance,
    loopback,
    lora_of,
    prompts,
    ragged,
    random_b,
)

OTHERS = [name for name in ROWS if name not in FAMILIES and name not in MULTIMODAL]
ANSWER = 24
"""Tokens of an answer: more than the sliding windows' 16."""
ROUNDING = 2e-5
"""Relative to the largest value. Attention with a mask for padding and without one differ by this."""
CHUNK = {"trunk": {"chunk": 16}}
"""Longer prompts are computed in pieces, in passes shared with other rows."""
MIX = [[3, 40], [17, 1, 23]]
"""Lengths of two silos' sequences."""
Answers = Callable[[str], torch.Tensor]


@pytest.fixture(scope="module", params=[(family, cut) for family in OTHERS for cut in CUTS], ids=str)
def twins(request: pytest.FixtureRequest, build: BuildTwins) -> Iterator[tuple[str, Twins]]:
    family, cut = request.param
    made = build(family, cut, ends_train_a=True, sections=CHUNK)
    yield family, made
    made.close()


@pytest.fixture(scope="module")
def answer(build: BuildTwins) -> Answers:
    """The uncut model's greedy tokens; twins of one family have the same adapters at every cut."""

    @cache
    def tokens(family: str) -> torch.Tensor:
        made = build(family, CUTS[0])
        made.close()
        return generate(made.whole)

    return tokens


def generate(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(**prompts(), min_new_tokens=ANSWER, max_new_tokens=ANSWER, do_sample=False)


def test_a_cut_model_is_the_uncut_one(twins: tuple[str, Twins], answer: Answers) -> None:
    """Logits, loss and gradients of ragged rows with padding on either side; greedy tokens with a cache, the prompts
    computed in chunks."""
    family, both = twins
    sides = ("left", "right") if both.parts[0].config.num_hidden_layers == 1 else ("left",)
    for side in sides:
        both.service._training.forget("a")
        batch = ragged(side)
        outputs = []
        for model in both.both:
            model.zero_grad()
            outputs.append(model(**batch))
            outputs[-1].loss.backward()
        split, whole = outputs
        real = batch["attention_mask"].bool()
        assert distance(split.logits[real].detach(), whole.logits[real].detach()) <= ROUNDING
        expected = {name: parameter.grad for name, parameter in lora_of(both.whole).items()}
        assert_same(both.split_gradients(), expected, 10 * ROUNDING)
    assert torch.equal(generate(both.split), answer(family))


@torch.no_grad()
def test_rows_without_padding_are_equal_bit_for_bit(twins: tuple[str, Twins]) -> None:
    split, whole = (model(**ragged("left", lengths=(30, 30))) for model in twins[1].both)
    assert torch.equal(split.logits, whole.logits)


def hidden(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def trunk_of(folder: Path, family: str) -> Runner:
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk")
    adapters.add_adapter(part, LoraSection(rank=4, targets=tuple(targets_of(family))), 0, freeze_a=False)
    adapters.load_adapter(part, random_b(adapters.adapter_of(part)))
    return Runner(part)


@pytest.mark.parametrize("family", OTHERS)
def test_a_pass_shared_with_others_is_each_sequence_alone(family: str, models: Models) -> None:
    """Two silos with adapters of their own: outputs and gradients. Then pieces of cached sequences in mixed passes.
    Both once more as on an accelerator, if the family allows its kernel."""
    runner = trunk_of(models(family), family)
    h_TD = hidden(84)
    leaves = [moved(adapters.adapter_of(runner.part), seed) for seed in (1, 2)]
    pieces = torch.split(h_TD, [43, 41])
    alone = [gradients(runner, h_ND, [own], [one])[0] for h_ND, own, one in zip(pieces, MIX, leaves, strict=True)]
    with torch.no_grad():
        whole = [runner.full_pass(h_ND, [len(h_ND)]) for h_ND in pieces]
    for kernel in (None, attend_padded) if runner.plan.uniform else (None,):
        runner._kernel, runner._groups._at_once = kernel, kernel is not None
        shared = gradients(runner, h_TD, MIX, leaves)
        assert_same(shared[0], alone[0], 10 * ROUNDING)
        assert_same(shared[1], alone[1], 10 * ROUNDING)
        with torch.no_grad():
            caches = [runner.new_cache(), runner.new_cache()]
            first = runner.cached_pass(torch.cat([h_TD[:20], h_TD[43:46]]), [20, 3], caches)
            then = runner.cached_pass(torch.cat([h_TD[20:43], h_TD[46:84]]), [23, 38], caches)
        got = torch.cat([first[:20], then[:23]]), torch.cat([first[20:], then[23:]])
        assert all(distance(one, other) <= 2 * ROUNDING for one, other in zip(got, whole, strict=True))


def moved(adapter: Tensors, seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (one + 0.2 * torch.randn(one.shape, generator=draw)).requires_grad_() for name, one in adapter.items()
    }


def gradients(runner: Runner, h_TD: torch.Tensor, lengths: list[list[int]], leaves: list[Tensors]) -> list[Tensors]:
    """Of each silo: its rows of the output, and the gradients of its adapter in this pass."""
    sizes = [sum(own) for own in lengths]
    grouped = [(size, full_adapter(runner.part, one)) for size, one in zip(sizes, leaves, strict=True)]
    output_TD = runner.full_pass(h_TD, [length for own in lengths for length in own], grouped)
    wanted = [tensor for one in leaves for tensor in one.values()]
    found = iter(torch.autograd.grad(output_TD, wanted, torch.ones_like(output_TD)))
    rows = torch.split(output_TD.detach(), sizes)
    return [{"output": own, **{name: next(found) for name in one}} for own, one in zip(rows, leaves, strict=True)]


@torch.no_grad()
def test_positions_that_attention_counts_from_the_cache_are_each_sequences_own(models: Models) -> None:
    """llama4 scales its queries by a position that it counts from the cache: in a shared pass and in pieces, too."""
    folder = models("llama4_text", floor_scale=8)
    runner, plain = trunk_of(folder, "llama4_text"), trunk_of(folder, "llama4_text")
    plain.part.config._attn_implementation = "sdpa"
    h_TD = hidden(43)
    alone = torch.cat([plain.part.hidden(inputs_embeds=h_ND[None])[0] for h_ND in torch.split(h_TD, [3, 40])])
    assert distance(runner.full_pass(h_TD, [3, 40]), alone) <= ROUNDING
    caches = [runner.new_cache(), runner.new_cache()]
    first = runner.cached_pass(torch.cat([h_TD[:2], h_TD[3:20]]), [2, 17], caches)
    then = runner.cached_pass(torch.cat([h_TD[2:3], h_TD[20:]]), [1, 23], caches)
    pieces = torch.cat([first[:2], then[:1], first[2:], then[1:]])
    assert distance(pieces, alone) <= ROUNDING


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, of transformers
@torch.no_grad()
def test_the_text_part_of_a_multimodal_model(family: str, models: Models, tmp_path: Path) -> None:
    """Logits and greedy tokens of the whole model without images; then with the exported adapter, read by peft."""
    folder = models(family)
    recipe = make_recipe(folder, lora={"targets": ["q_proj", "v_proj"]}, **CHUNK)
    service = TrunkService(recipe, RoleDirectory(tmp_path / "trunk"))
    split = join(recipe, "a", channel=loopback(service, "a", recipe)).model
    parts = split.bottom, service._runner.part, split.top
    for tensors in (None, random_b({n: one for part in parts for n, one in adapters.adapter_of(part).items()})):
        whole = uncut(folder)
        if tensors is not None:
            for part in parts:
                adapters.load_adapter(part, tensors)
            everything = {name: one for part in parts for name, one in adapters.adapter_of(part).items()}
            adapters.write_adapter(tmp_path / "out", everything, recipe.lora, str(folder))
            whole = PeftModel.from_pretrained(whole, str(tmp_path / "out")).eval()
        batch = ragged("left")
        real = batch.pop("attention_mask"), batch.pop("labels")
        logits = [model(**batch, attention_mask=real[0]).logits[real[0].bool()] for model in (split, whole)]
        assert distance(*logits) <= ROUNDING
        assert torch.equal(generate(split), generate(whole))
    service.stop()
