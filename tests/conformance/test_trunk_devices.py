"""The trunk on an accelerator: no step of a pass mixes devices, and where there is one, it computes what the CPU does.

Shapes: T tokens of all sequences, D width, H heads, G heads of keys and values, d width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.model.rounded_linear import round_weights
from isthmus.recipe import LoraSection
from isthmus.storage.record import RunDirectory
from isthmus.trunk.adapter import full_adapter
from isthmus.trunk.attention_kernels import PackedLayout, Varlen, attend_padded, find_varlen, kernel_for
from isthmus.trunk.runner import Runner
from tests.conftest import make_recipe, needs_bits, plan_of, save_tiny_model, targets_of
from tests.oracle.ropes import save_roped_model
from tests.oracle.twins import distance, random_b
from tests.unit.trunk.talk import ONE, Trunk, alone, assert_equal, prompt, tokens

WIDTH = 32
FAMILIES = ("llama", "mistral", "qwen3", "gemma2")
LENGTHS = [3, 40, 1, 23]
META, CPU, CUDA = (torch.device(name) for name in ("meta", "cpu", "cuda"))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
anywhere = pytest.mark.parametrize("device", [META, pytest.param(CUDA, marks=needs_cuda)], ids=str)
FP32, BF16, FLASH = 1e-4, 0.1, 0.05
"""How far results may be apart, relative to the largest: kernels sum in other orders."""


def runner_on(
    folder: Path, family: str, device: torch.device, dtype: torch.dtype = torch.float32, weights: str | None = None
) -> Runner:
    first = device if weights is None else CPU
    part = load_part(Checkpoint(str(folder)), Cut(1, 1), "trunk", dtype=dtype, device=first)
    layers = list(part.plain_layers())
    adapters.add_adapter(part, LoraSection(rank=4, targets=tuple(targets_of(family))), 0, freeze_a=False)
    if device.type != "meta":
        adapters.load_adapter(part, random_b(adapters.adapter_of(part)))
    if weights is not None:
        round_weights(part, layers, weights, device)
    return Runner(part, record=False if weights else None)


def hidden(tokens: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


def trained(runner: Runner) -> list[torch.Tensor]:
    """Output and gradients of a pass of three silos, each through an adapter of its own."""
    stretches = [LENGTHS, [7], [9, 9]]
    h_TD, gradient_TD = (hidden(sum(map(sum, stretches)), runner.device, seed) for seed in (0, 1))
    leaf = h_TD.to(runner.dtype).requires_grad_()
    named = adapters.trainable(runner.part)
    leaves = [{name: one.detach().requires_grad_() for name, one in named.items()} for _ in stretches]
    own = [(sum(lengths), full_adapter(runner.part, one)) for lengths, one in zip(stretches, leaves, strict=True)]
    output_TD = runner.full_pass(leaf, [length for lengths in stretches for length in lengths], own)
    wanted = [leaf, *[tensor for one in leaves for tensor in one.values()]]
    return [output_TD.detach(), *torch.autograd.grad(output_TD, wanted, gradient_TD.to(output_TD))]


def decoded(runner: Runner) -> list[torch.Tensor]:
    """Prompts of sessions, a token of each, and a session that joins with a prompt beside the others' tokens."""
    caches = [runner.new_cache() for _ in (*LENGTHS, 1)]
    with torch.inference_mode():
        return [
            runner.cached_pass(hidden(sum(LENGTHS), runner.device), LENGTHS, caches[:-1]),
            runner.cached_pass(hidden(len(LENGTHS), runner.device, 1), [1] * len(LENGTHS), caches[:-1]),
            runner.cached_pass(hidden(24, runner.device, 2), [1, 1, 1, 4, 17], caches),
        ]


@anywhere
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_pass_stays_on_the_device(family: str, device: torch.device, tmp_path: Path) -> None:
    runner = runner_on(save_tiny_model(family, tmp_path), family, device)
    found = [*trained(runner), *decoded(runner)]
    assert {tensor.device.type for tensor in found} == {device.type}


@anywhere
def test_frequencies_by_length_stay_on_the_device(device: torch.device, tmp_path: Path) -> None:
    runner = runner_on(save_roped_model("phi3", "longrope", tmp_path), "phi3", device)
    assert {tensor.device.type for tensor in [*trained(runner), *decoded(runner)]} == {device.type}


@needs_cuda
@pytest.mark.parametrize(("family", "kind"), [("phi3", "longrope"), ("llama", "dynamic")])
def test_the_device_computes_frequencies_by_length_as_the_processor(family: str, kind: str, tmp_path: Path) -> None:
    folder = save_roped_model(family, kind, tmp_path)
    here, there = (runner_on(folder, family, torch.device(device)) for device in ("cpu", "cuda"))
    for compute in (trained, decoded):
        for one, other in zip(compute(there), compute(here), strict=True):
            assert distance(one.cpu(), other) <= FP32


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=str)
def test_the_device_computes_what_the_processor_does(
    family: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path)
    here, there = (runner_on(folder, family, torch.device(device), dtype) for device in ("cpu", "cuda"))
    for compute in (trained, decoded):
        for one, other in zip(compute(there), compute(here), strict=True):
            assert distance(one.float().cpu(), other.float()) <= tolerance


@needs_bits
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_cuda)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_4_bits_on_the_device_are_those_of_the_processor(
    family: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path, intermediate_size=64)
    there = runner_on(folder, family, device, dtype, "nf4")
    here = runner_on(folder, family, CPU, weights="nf4")
    kept = [*there.part.parameters(), *there.part.buffers()]
    assert {one.device.type for one in kept} == {device.type}
    assert sum(one.dtype is torch.uint8 for one in there.part.buffers()) > 0
    for compute in (trained, decoded):
        for one, other in zip(compute(there), compute(here), strict=True):
            assert distance(one.float().cpu(), other) <= BF16


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("groups", [8, 2])
def test_flash_attention_on_packed_sequences_is_attention_on_padded_ones(
    dtype: torch.dtype, window: int | None, groups: int
) -> None:
    function = find_varlen()
    if function is None or not isinstance(kernel_for(plan_of("sdpa"), CUDA, dtype), Varlen):
        pytest.skip("this torch or device has no flash attention on packed sequences")
    draw = torch.Generator("cuda").manual_seed(0)
    for new, seen in ((LENGTHS, LENGTHS), ([1, 1, 1], [40, 7, 100]), ([1, 30, 4], [1, 90, 4])):
        layout = PackedLayout(new, seen, window, CUDA)
        shapes = [(1, 8, sum(new), 64), (1, groups, sum(seen), 64), (1, groups, sum(seen), 64)]
        states = [torch.randn(*shape, device=CUDA, dtype=dtype, generator=draw).requires_grad_() for shape in shapes]
        results = []
        for kernel in (Varlen(function), attend_padded):
            output = kernel(*states, layout, None)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), states)])
        for one, other in zip(*results, strict=True):
            assert distance(one.float(), other.float()) <= FLASH


def service(model: Path, directory: Path, **section: Any) -> Trunk:
    return Trunk(make_recipe(model, silos=("a", "b", "c", "d"), trunk=section), directory)


@needs_cuda
def test_a_trunk_on_the_device_answers_as_one_on_the_processor(tmp_path: Path) -> None:
    """Sessions of several silos at once, with rows kept and positions forgotten, over the service."""
    model = save_tiny_model("llama", tmp_path / "model", initializer_range=0.3)
    stories = [[prompt(20 + 7 * number), ONE, tokens(4), tokens(1, forget=3), ONE] for number in range(4)]
    here, there = service(model, tmp_path / "here"), service(model, tmp_path / "there", device="cuda")
    expected = [alone(here, number, story) for number, story in enumerate(stories)]
    with there.held():
        silos = [there.silo(name) for name in "abcd"]
        answers = [silo.tell(number, story) for (number, story), silo in zip(enumerate(stories), silos, strict=True)]
    for got, one in zip(answers, expected, strict=True):
        assert_equal(got, one, FP32)
    for trunk in (here, there):
        trunk.service.stop()


@needs_cuda
def test_a_round_saved_on_the_device_is_restored_anywhere(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    for adapter in ("shared", "replica"):
        directory = tmp_path / adapter
        there = service(model, directory, device="cuda", adapter=adapter)
        training = there.service._training
        there.service._scheduler.submit(lambda training=training: training.save(3)).result()
        there.service.stop()
        state = RunDirectory(directory).role("trunk").load_round(3)
        assert {tensor.device.type for tensor in state["adapter"].values()} == {"cpu"}
        here = service(model, directory, adapter=adapter)
        here.service.restore(3)
        here.service.stop()
