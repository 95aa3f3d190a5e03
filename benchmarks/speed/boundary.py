"""The crossing: bytes against the published formats, what they cost in quality, and how fast they are made.

``make bench-boundary``, or ``python -m benchmarks.speed.boundary PART ...`` for some of: ``bytes``, ``token``,
``speed``, ``bits``, ``quality``. Shapes: T tokens, D width.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.results import Results
from benchmarks.speed import published
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import batches, collate
from isthmus.demo.assets import hutto, smollm2
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.optim import build_optimizer
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting, join, load_tokenizer
from isthmus.silo.trainer import evaluate, train_step
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel

CACHE = Path("build/demo")
LENGTHS, PADDED, WIDTH = [674, 367], 920, 4096
STEPS = 40
CODECS = ("fp32", "int8", "int4")
CPU = torch.device("cpu")


def main() -> None:
    """All of it, or the parts that are named."""
    parts: dict[str, Callable[[Results], None]] = {
        "bytes": measure_training_bytes,
        "token": measure_token_bytes,
        "speed": measure_codec_speed,
        "bits": measure_bits,
        "quality": measure_quality,
    }
    results = Results("boundary", "make bench-boundary")
    for part in sys.argv[1:] or parts:
        parts[part](results)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


def residual_stream(rows: int, width: int) -> torch.Tensor:
    """Hidden states as transformers have them: a few channels and the first position dwarf the rest."""
    h_TD = torch.randn(rows, width) * 3
    h_TD[:, :: width // 2] *= 50
    h_TD[0, 100] = 400
    return h_TD


def measure_training_bytes(results: Results, device: torch.device = CPU) -> None:
    """Whole frames of one step, in all four directions, of tensors on this device."""
    before = published.training_step_bytes(LENGTHS, PADDED, WIDTH) / 2**20
    results.add("training step, published format", before, "MiB")
    hidden, gradient = residual_stream(sum(LENGTHS), WIDTH), torch.randn(sum(LENGTHS), WIDTH) * 1e-5
    hidden, gradient = hidden.to(device), gradient.to(device)
    for name, goal in (("fp32", None), ("int8", 17.0), ("int8+zstd", 17.0), ("int4", 9.0), ("int4+zstd", 9.0)):
        h, g = codec.encode(hidden, name), codec.encode(gradient, name, torch.Generator(device))
        bodies = (
            pb.Forward(step=1, lengths=LENGTHS, hidden=h, train=True),
            pb.Hidden(hidden=h),
            pb.Backward(step=1, gradient=g, reply=True),
            pb.Gradient(gradient=g),
        )
        size = sum(frames.wrap(body, id=1).ByteSize() for body in bodies) / 2**20
        results.add(f"training step, {name}", size, "MiB", at_most=goal)
    results.add("mask and position bytes, published, first token at 4096", published.mask_bytes(4096) / 2**20, "MiB")
    fields = {field.name for message in (pb.Forward, pb.Decode) for field in message.DESCRIPTOR.fields}
    known = {"step", "lengths", "hidden", "train", "examples", "session", "forget", "rows", "drafted"}
    results.add("fields that could hold a mask or positions", len(fields - known), "fields", at_most=0)


def measure_token_bytes(results: Results, device: torch.device = CPU) -> None:
    """A decoded token's frame, one direction."""
    results.add("decoded token, published format", published.token_bytes(WIDTH) / 1024, "KiB")
    for name, goal in (("int8", 4.3), ("int4", 4.3)):
        h = codec.encode(residual_stream(2, WIDTH)[1:].to(device), name)
        size = frames.wrap(pb.Decode(session=1, step=300, lengths=[1], hidden=h), id=1000, acked=999).ByteSize()
        results.add(f"decoded token, {name}", size / 1024, "KiB", at_most=goal)


def measure_codec_speed(results: Results, device: torch.device = CPU, where: str = "one core") -> None:
    """Gigabytes of fp32 input a second, on one core, or from and to an accelerator with the copying of bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    h_TD = residual_stream(sum(LENGTHS), WIDTH).to(device)
    size = h_TD.numel() * 4 / 1e9
    for name, at_random, goal in (("int8", False, 1.0), ("int8", True, None), ("int4", False, None)):
        generator = torch.Generator(device) if at_random else None
        matrix = codec.encode(h_TD, name, generator)
        decode = partial(codec.decode, matrix, rows=sum(LENGTHS), width=WIDTH, codec=name, device=device)
        how = f"{name}, rounded at random" if at_random else name
        encoding, decoding = median_seconds(partial(codec.encode, h_TD, name, generator)), median_seconds(decode)
        results.add(f"encode {how}, {where}", size / encoding, "GB/s", at_least=goal)
        results.add(f"decode {how}, {where}", size / decoding, "GB/s", at_least=goal)
    torch.set_num_threads(threads)


def measure_bits(results: Results) -> None:
    """Bits a value, and gigabytes of fp32 a second on one core, of what SmolLM2 lets cross in a training step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for what, x_TD in zip(("hidden states", "gradients"), crossing(), strict=True):
        size, rounding = x_TD.numel() * 4 / 1e9, torch.Generator() if what == "gradients" else None
        for name in ("int8", "int4", *codec.RANGE_CODECS):
            matrix = codec.encode(x_TD, name, rounding)
            decode = partial(codec.decode, matrix, rows=len(x_TD), width=x_TD.shape[1], codec=name)
            results.add(f"{what}, {name}", 8 * matrix.ByteSize() / x_TD.numel(), "bits a value")
            encoding = median_seconds(partial(codec.encode, x_TD, name, rounding))
            results.add(f"encode {what}, {name}, one core", size / encoding, "GB/s")
            results.add(f"decode {what}, {name}, one core", size / median_seconds(decode), "GB/s")
    torch.set_num_threads(threads)


def crossing() -> tuple[torch.Tensor, torch.Tensor]:
    """What goes up and what comes down behind two blocks of SmolLM2 for reviews as free text: hidden states and their
    gradients, both ``[T, D]``."""
    recipe = quality_recipe("fp32")
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    data = SiloData(recipe.silo[0], recipe, load_tokenizer(Path(recipe.model.path)))
    batch = collate(next(batches(data.train, 8, "0")), data.pad)
    kept: list[torch.Tensor] = []

    def keep(module: Any, given: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        kept[0].retain_grad()

    model.model.layers[recipe.model.bottom - 1].register_forward_hook(keep)
    model(**batch.inputs(), use_cache=False).loss.backward()
    (h_BLD,), real_BL = kept, batch.attention_mask.bool()
    assert h_BLD.grad is not None
    return h_BLD.detach()[real_BL], h_BLD.grad[real_BL]


def median_seconds(work: Callable[[], Any]) -> float:
    """Of seven, after a warm-up."""
    work()
    times = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_quality(results: Results) -> None:
    """Held-out loss after split training on reviews as free text, with each codec in all four directions."""
    losses = {name: trained_loss(name) for name in CODECS}
    for name, loss in losses.items():
        results.add(f"held-out loss after {STEPS} steps, {name}", loss["after"], "nats")
        results.add(f"held-out loss before training, {name}", loss["before"], "nats")
    for name, goal in (("int8", 0.005), ("int4", 0.01)):
        off = abs(losses[name]["after"] / losses["fp32"]["after"] - 1)
        results.add(f"held-out loss off fp32's, {name}", off, "relative", at_most=goal)


def trained_loss(name: str) -> dict[str, float]:
    recipe = quality_recipe(name)
    with tempfile.TemporaryDirectory() as temporary:
        service = TrunkService(recipe, RoleDirectory(Path(temporary)))
        hello = greeting(Checkpoint(recipe.model.path), recipe)
        silo = join(recipe, "movies", channel=LoopbackChannel(service, "movies", greeting=hello))
        data = SiloData(recipe.silo[0], recipe, silo.tokenizer)
        before = evaluate(silo.model, data)["loss"]
        parameters = [p for p in silo.model.parameters() if p.requires_grad]
        optimizer, drawn = build_optimizer(parameters, recipe.train), batches(data.train, recipe.train.batch, "0")
        silo.rounds.begin(1, ["movies"])
        for number in range(1, STEPS + 1):
            step = train_step(silo.model, optimizer, collate(next(drawn), data.pad))
            silo.rounds.commit(1, number, step.weight)
        after = evaluate(silo.model, data)["loss"]
        service.stop()
    return {"before": before, "after": after}


def quality_recipe(name: str) -> Recipe:
    files = hutto(CACHE, rows=160, held_out=60, seed=1)["movies"]
    return Recipe.of(
        {
            "model": {"path": str(smollm2(CACHE).resolve()), "bottom": 2, "top": 2},
            "train": {"steps": STEPS, "batch": 4, "learning_rate": 5e-4},
            "task": {"prompt": "A film review:", "answer": " {text}"},
            "boundary": {"codec": name} | {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
            "silo": [{"name": "movies", "train": str(files.train), "held_out": str(files.held_out)}],
        }
    )


if __name__ == "__main__":
    main()
