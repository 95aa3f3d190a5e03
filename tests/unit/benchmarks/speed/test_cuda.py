"""The CUDA benchmark: the same code runs here with a tiny shape, and without a device it says so and writes nothing."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.results import RESULTS, Results
from benchmarks.speed import boundary, cuda, sessions
from benchmarks.speed.random_weights import RandomCheckpoint
from isthmus.model.cut import Cut, load_part
from tests.conftest import needs_bits

TINY = cuda.SHAPES["tiny"]
CPU = torch.device("cpu")


def written() -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in RESULTS.glob("*.json")}


@contextmanager
def in_a_thread(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """As ``cuda.beside``, without a process that has torch to import first."""
    ours, theirs = Pipe()
    thread = threading.Thread(target=work, args=(theirs, *arguments), daemon=True)
    thread.start()
    yield ours
    ours.close()
    thread.join(30.0)
    assert not thread.is_alive()


@needs_bits
@pytest.mark.usefixtures("bitsandbytes")
def test_every_measure_runs_with_a_tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "beside", in_a_thread)
    for name, value in {"WIDTH": 256, "LENGTHS": [40, 30], "PADDED": 64}.items():
        monkeypatch.setattr(boundary, name, value)
    before, results = written(), Results("cuda", "make bench-cuda", CPU)
    cuda.measure(results, replace(TINY, sessions=(1, 3)), "cpu")
    assert all(math.isfinite(row.value) and row.value >= 0 for row in results.rows)
    measures = [row.measure for row in results.rows]
    assert len(set(measures)) == len(measures)
    for expected in (
        "training step, int8",
        "decoded token, int8",
        "encode int8, from and to the device",
        "trunk: 3 sessions against 1",
        "2 silos of 8 + 5 tokens, shared: speed against sequential",
        "2 silos of 8 + 5 tokens, replica: speed against sequential",
        "tokens/s after the prompt, caches / published, median of 1",
        "training step 2 × 8: time, split / uncut",
        "decode: ratio of tokens/s, split / uncut",
        "nf4 trunk over float32 trunk",
    ):
        assert expected in measures
    assert written() == before


@pytest.mark.process
def test_the_trunk_is_a_process_of_its_own_that_ends_with_the_block() -> None:
    with cuda.serving(cuda.recipe_of(TINY, "cpu", "bf16"), TINY) as recipe:
        assert len(multiprocessing.active_children()) == 1
        silo = cuda.connected(recipe, TINY, "silo-0")
        [session] = sessions.prompted(silo.trunk, 1, TINY.prompt, TINY.model["hidden_size"])
        session.close()
        silo.close()
    assert multiprocessing.active_children() == []


def test_without_a_device_it_names_what_is_missing_and_writes_nothing() -> None:
    before = written()
    command = [sys.executable, "-m", "benchmarks.speed.cuda", "--device", "cuda:99"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parents[1], check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("nothing was measured: there is no device 'cuda:99' here")
    assert len(done.stderr.splitlines()) == 1
    assert written() == before


def test_random_weights_have_the_shapes_of_the_model() -> None:
    checkpoint = RandomCheckpoint(TINY.model, torch.bfloat16, CPU)
    for name in ("bottom", "trunk", "top"):
        part = load_part(checkpoint, Cut(2, 2), name, dtype=torch.bfloat16)  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert len(checkpoint.tensors_read) == len(checkpoint._shapes)


def test_the_shape_is_llama_2_s() -> None:
    checkpoint = RandomCheckpoint(cuda.SHAPES["llama-2-7b"].model, torch.bfloat16, CPU)
    assert sum(shape.numel() for shape in checkpoint._shapes.values()) == 6_738_415_616
