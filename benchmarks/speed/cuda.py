"""The crossing and the trunk on a CUDA device, with random weights of the LLaMA-2-7B shape in bf16.

``make bench-cuda``.
What is measured elsewhere on the CPU, by the same code: bytes and codecs (``boundary``), sessions decoding at once
(``sessions``), generation against the published mode (``generation``), silos computed together (``together``), steps
and decoding beside the uncut model (``foundation``). The trunk is a process of its own on the device. Silos send
prepared states, for sessions from processes of their own, since many in one would wait for one another; one that
generates or is set beside the uncut model has its ends on the device too. ``--device cpu
--shape tiny`` runs everything anywhere, and writes nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.bare import BareSilo
from benchmarks.common.results import Results
from benchmarks.speed import boundary, foundation, generation, sessions, together
from benchmarks.speed.foundation import wait_for
from benchmarks.speed.random_weights import RandomCheckpoint
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address
from isthmus.errors import NotSupportedError, RecipeError
from isthmus.model import adapters
from isthmus.model.cut import Cut, load_part
from isthmus.model.device import find_device
from isthmus.model.rounded_linear import BITSANDBYTES, check_machine, round_weights
from isthmus.model.split import SplitForCausalLM
from isthmus.recipe import LoraSection, Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import build_model, connect, greeting, load_ends
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.runner import Runner
from isthmus.trunk.service import TrunkService
from isthmus.wire.identity import Identity
from isthmus.wire.server import Server

START_SECONDS, END_SECONDS = 300.0, 30.0
ENDS = 2
"""Blocks at each end of the cut."""
SESSION_GOALS = {8: 6.0, 32: 18.0}
"""As of ``sessions``, on a card."""
GENERATION_GOALS = {generation.CACHED: 15.0}
STEP_GOAL = round(1 / 0.95, 3)
"""How many times as long as the uncut model's a step of the split model may take."""


@dataclass(frozen=True)
class Shape:
    """A model and how much of it is measured."""

    model: dict[str, Any]
    dtype: str
    prompt: int
    """Tokens that a session starts from."""
    answer: int
    sessions: tuple[int, ...]
    clients: int
    """Processes that the sessions are spread over."""
    silos: int
    lengths: tuple[int, ...]
    """Of the sequences of a silo's training step."""
    steps: int
    repeats: int


SHAPES = {
    "llama-2-7b": Shape(
        model={
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        dtype="bfloat16",
        prompt=512,
        answer=64,
        sessions=(1, 8, 32),
        clients=8,
        silos=8,
        lengths=(128, 128),
        steps=9,
        repeats=5,
    ),
    "tiny": Shape(
        model={
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
        dtype="float32",
        prompt=24,
        answer=4,
        sessions=(1, 3),
        clients=2,
        silos=2,
        lengths=(8, 5),
        steps=2,
        repeats=1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The benchmarks on a CUDA device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    arguments = parser.parse_args()
    try:
        device = find_device(arguments.device)
    except RecipeError as error:
        sys.exit(f"nothing was measured: {error.message}")
    results = Results("cuda", "make bench-cuda", device)
    kept, done = device.type == "cuda" and arguments.shape == parser.get_default("shape"), False
    try:
        measure(results, SHAPES[arguments.shape], arguments.device)
        done = True
    finally:  # what was measured before a failure is kept beside earlier rows
        print(f"written: {results.write(keep=not done)}" if kept else "not written: not what results are kept of")


def measure(results: Results, shape: Shape, device: str) -> None:
    """Everything, in the order of how much can go wrong."""
    there = find_device(device)
    boundary.measure_training_bytes(results, there)
    boundary.measure_token_bytes(results, there)
    boundary.measure_codec_speed(results, there, "from and to the device")
    measure_token_pass(results, shape, there)
    measure_sessions(results, shape, device)
    measure_together(results, shape, device)
    measure_generation(results, shape, device)
    measure_beside_uncut(results, shape, device)
    measure_few_bits(results, shape, there)


def measure_token_pass(results: Results, shape: Shape, device: torch.device) -> None:
    """The trunk's pass over one token of each session, recorded and not, beside reading its weights once."""
    runners = {}
    for name, record in (("recorded", None), ("not recorded", False)):
        part = load_part(
            checkpoint_of(shape, device.type), Cut(ENDS, ENDS), "trunk", device=device, dtype=dtype_of(shape)
        )
        adapters.add_adapter(part, LoraSection(), 0, freeze_a=False)
        runners[name] = Runner(part, record=record)
    weights = sum(parameter.nbytes for parameter in part.parameters())
    bound = read_seconds(weights, device)
    results.add("reading the trunk's weights once", 1000 * bound, "ms")
    for count in shape.sessions:
        times = {name: token_pass_seconds(runner, count, shape, device) for name, runner in runners.items()}
        for name, values in times.items():
            what = f"one token of {count} sessions, {name}"
            results.add(what, 1000 * statistics.median(values), "ms")
            results.add(f"{what}, longest of {len(values)}", 1000 * max(values), "ms")
        goal = 1.6 if count == 1 else None
        ratio = statistics.median(times["recorded"]) / bound
        results.add(
            f"one token of {count} sessions, recorded, against reading the weights", ratio, "ratio", at_most=goal
        )


@torch.inference_mode()
def token_pass_seconds(runner: Runner, count: int, shape: Shape, device: torch.device) -> list[float]:
    """Seconds of each of some passes after prompts; the first few, which record, are left out."""
    width, seconds = shape.model["hidden_size"], []
    caches = [runner.new_cache() for _ in range(count)]
    for number, cache in enumerate(caches):
        h_TW = torch.randn(shape.prompt + number, width, device=device)
        runner.cached_pass(h_TW, [len(h_TW)], [cache])
    for _ in range(shape.answer):
        h_TW = torch.randn(count, width, device=device)
        wait_for(device)
        started = time.perf_counter()
        runner.cached_pass(h_TW, [1] * count, caches)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return seconds[len(seconds) // 4 :]


def read_seconds(nbytes: int, device: torch.device) -> float:
    """Seconds to read so many bytes of the device's memory: the fastest of ten sums over 2 GiB, in proportion."""
    values, seconds = torch.ones(2**30 if device.type == "cuda" else 2**22, dtype=torch.float16, device=device), []
    for _ in range(10):
        wait_for(device)
        started = time.perf_counter()
        values.sum()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * nbytes / values.nbytes


def measure_sessions(results: Results, shape: Shape, device: str) -> None:
    """Tokens a second of sessions that decode at once at the trunk."""
    with serving(recipe_of(shape, device, "bf16"), shape) as recipe, ExitStack() as stack:
        names = [silo.name for silo in recipe.silo[: shape.clients]]
        clients = [stack.enter_context(beside(decode, recipe, shape, name)) for name in names]

        def rate(count: int) -> float:
            shares = [count // len(clients) + (number < count % len(clients)) for number in range(len(clients))]
            at_work = [(client, share) for client, share in zip(clients, shares, strict=True) if share]
            for client, share in at_work:
                client.send(share)
            for client, _ in at_work:
                client.recv()
            started = time.perf_counter()
            for client, _ in at_work:
                client.send(None)
            for client, _ in at_work:
                client.recv()
            return count * shape.answer / (time.perf_counter() - started)

        sessions.report(results, "trunk", sessions.measure(shape.sessions, rate, shape.repeats), SESSION_GOALS)


def decode(pipe: Connection, recipe: Recipe, shape: Shape, name: str) -> None:
    """Be a silo: open as many sessions as the pipe says, decode when it says so, and tell when both is done."""
    torch.set_num_threads(1)
    silo, width = connected(recipe, shape, name), shape.model["hidden_size"]
    with suppress(EOFError):
        while True:
            opened = sessions.prompted(silo.trunk, pipe.recv(), shape.prompt, width)
            pipe.send(None)
            pipe.recv()
            sessions.decode(opened, shape.answer, width)
            pipe.send(None)
            for session in opened:
                session.close()
    silo.close()


def measure_together(results: Results, shape: Shape, device: str) -> None:
    """Training steps of all silos, in each way of computing them; a trunk for each way, one after another."""
    seconds: dict[str, list[float]] = {}
    for name, section in together.WAYS.items():
        with serving(recipe_of(shape, device, "bf16", {**section, "gather": 0.5}), shape) as recipe:
            silos = {silo.name: connected(recipe, shape, silo.name) for silo in recipe.silo}
            federation = together.Federation(silos, shape.model["hidden_size"])
            seconds[name] = [federation.step(list(shape.lengths)) for _ in range(shape.steps + 1)][1:]
            for silo in silos.values():
                silo.close()
    what = f"{shape.silos} silos of {' + '.join(map(str, shape.lengths))} tokens"
    for name, values in seconds.items():
        results.add(f"{what}, {name}: step", statistics.median(values), "s")
    times = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    together.report(results, what, times)


def measure_generation(results: Results, shape: Shape, device: str) -> None:
    """Generation with caches against the published mode without any; all cross in fp16."""
    ids = torch.randint(3, shape.model["vocab_size"], (1, shape.prompt)).to(find_device(device))
    with serving(recipe_of(shape, device, "fp16"), shape) as recipe, split_model(recipe, shape, "silo-0") as model:
        modes = generation.modes_of(model, ids)
        modes.pop(generation.LOOKUP)  # what random weights say is nowhere to be looked up
        generation.measure_seconds(results, modes, GENERATION_GOALS, answer=shape.answer, repeats=shape.repeats)


def measure_beside_uncut(results: Results, shape: Shape, device: str) -> None:
    """Training steps and decoding beside the uncut model on the same device, both with their ends and logits there."""
    with serving(recipe_of(shape, device, "bf16"), shape) as recipe, split_model(recipe, shape, "silo-0") as split:
        whole = foundation.adapted(checkpoint_of(shape, device).whole(), recipe)
        ids = foundation.some_ids(whole, len(shape.lengths), max(shape.lengths))
        foundation.measure_step(results, split, "silo-0", whole, ids, at_most=STEP_GOAL)
        foundation.measure_decode(results, split, whole, foundation.some_ids(whole, 1, shape.prompt), shape.answer)


def measure_few_bits(results: Results, shape: Shape, device: torch.device) -> None:
    """A trunk in 4 bits: its bytes over those of one in 16, and its pass of one token beside that, neither recorded."""
    try:
        check_machine(BITSANDBYTES, device)
    except NotSupportedError as error:
        print(f"4 bits were not measured: {error.message}")
        return
    kept, times = {}, {}
    for name in (shape.dtype, BITSANDBYTES):
        part = load_part(
            checkpoint_of(shape, device.type), Cut(ENDS, ENDS), "trunk", device=device, dtype=dtype_of(shape)
        )
        if name == BITSANDBYTES:
            round_weights(part, list(part.plain_layers()), BITSANDBYTES, device)
        kept[name] = sum(one.nbytes for one in (*part.parameters(), *part.buffers()))
        times[name] = token_pass_seconds(Runner(part, record=False), 1, shape, device)
        results.add(f"{name} trunk keeps", kept[name] / 1e6, "MB")
        results.add(f"{name} trunk: one token of 1 session, not recorded", 1000 * statistics.median(times[name]), "ms")
    results.add(
        f"{BITSANDBYTES} trunk over {shape.dtype} trunk", kept[BITSANDBYTES] / kept[shape.dtype], "ratio", at_most=0.3
    )


def recipe_of(shape: Shape, device: str, codec: str, trunk: dict[str, Any] | None = None) -> Recipe:
    """A federation of the shape's silos. Nothing is noised: the silos' own work is not what is measured."""
    section = {"device": device, "session_bytes": 64 * 2**30, "sessions": 256, **(trunk or {})}
    return Recipe.of(
        {
            "model": {"path": "random", "bottom": ENDS, "top": ENDS, "dtype": shape.dtype},
            "train": {"evaluate": False, "steps": 100_000},
            "boundary": {"codec": codec} | {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
            "trunk": section,
            "silo": [
                {"name": f"silo-{number}", "train": "none.jsonl", "device": device} for number in range(shape.silos)
            ],
        }
    )


def dtype_of(shape: Shape) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, shape.dtype)
    return dtype


def checkpoint_of(shape: Shape, device: str) -> RandomCheckpoint:
    return RandomCheckpoint(shape.model, dtype_of(shape), find_device(device))


@contextmanager
def split_model(recipe: Recipe, shape: Shape, name: str) -> Iterator[SplitForCausalLM]:
    """This silo's model with its ends, during the block."""
    checkpoint = checkpoint_of(shape, recipe.party(name).device)
    ends = load_ends(checkpoint, recipe, find_device(recipe.party(name).device))
    channel = connect(recipe, name, "Trunk", recipe.trunk.address, greeting(checkpoint, recipe))
    with closing(channel):
        yield build_model(recipe, checkpoint, ends, channel, Boundary(recipe.boundary))


def connected(recipe: Recipe, shape: Shape, name: str) -> BareSilo:
    """This silo without its ends."""
    hello = greeting(checkpoint_of(shape, "cpu"), recipe)
    channel = connect(recipe, name, "Trunk", recipe.trunk.address, hello)
    return BareSilo(channel, recipe.boundary, shape.model["hidden_size"])


@contextmanager
def serving(recipe: Recipe, shape: Shape) -> Iterator[Recipe]:
    """A trunk in a process of its own during the block; gives the recipe with its address."""
    with tempfile.TemporaryDirectory() as temporary:
        wire = recipe.wire.model_copy(update={"certificates": f"{temporary}/certificates"})
        recipe = recipe.model_copy(update={"wire": wire})
        make_certificates(recipe, Path(wire.certificates))
        with beside(serve, recipe, shape, temporary) as pipe:
            if not pipe.poll(START_SECONDS):
                raise TimeoutError(f"no trunk after {START_SECONDS:.0f} s")
            yield at_address(recipe, pipe.recv())


@contextmanager
def beside(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Another process that does this work during the block; gives a pipe to it, and ends with it."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(END_SECONDS)
        process.kill()


def serve(pipe: Connection, recipe: Recipe, shape: Shape, folder: str) -> None:
    """Be the trunk until the other end of the pipe closes; tells it the address."""
    checkpoint = checkpoint_of(shape, recipe.trunk.device)
    service = TrunkService(recipe, RoleDirectory(Path(folder) / "trunk"), checkpoint=checkpoint)
    identity = Identity.load(Path(recipe.wire.certificates), "trunk", "trunk")
    names = tuple(silo.name for silo in recipe.silo)
    server = Server({"Trunk": service}, identity, {"Trunk": names}, "localhost:0", recipe.wire.max_frame_bytes)
    server.start()
    pipe.send(f"localhost:{server.port}")
    try:
        pipe.recv()
    except EOFError:
        server.stop()
        service.stop()


if __name__ == "__main__":
    main()
