"""A checkout of FedSEA-LLaMA: its server and its client as two processes over its own gRPC, started from outside.

Nothing in the checkout is changed. The programs run in a folder of this benchmark, which holds the model's parts, the
rows and what they write; ``inside`` says what is replaced within their processes.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.ports import free_port
from benchmarks.common.proxy import CountingProxy

INSIDE = Path(__file__).with_name("inside.py").resolve()
SERVER, CLIENT = "src/flserver.py", "src/flclient_id_0.py"
NEEDED = (SERVER, CLIENT, "clientA/modeling_llama_A.py", "clientC/modeling_llama_C.py", "server/modeling_llama_B.py")
COMMAND = "make bench-peer-fedsea FEDSEA=path/to/SplitFedLLM/FedSEA-LLaMA"
PAD, IGNORED = 3, -100
START_SECONDS, LONGEST_SECONDS = 120, 3600

Batches = list[list[list[int]]]
"""Rows of token ids, batch by batch."""
Notes = list[dict[str, Any]]
"""What ``meter`` wrote: the first line before anything, then one for each step or token."""


class CheckoutError(Exception):
    """There is no such checkout, or its programs do not run."""


@dataclass(frozen=True)
class Measured:
    """One run of both processes."""

    notes: Notes
    sent: int
    """Bytes from the silo through the socket; 0 if they were not counted."""
    received: int


@dataclass(frozen=True)
class Checkout:
    """The other code, ready to run.

    Args:
        path: the folder with ``src``, ``clientA``, ``clientC`` and ``server``.
        python: the interpreter of its environment.
        folder: where the programs run (see ``model.divide``).

    Raises:
        CheckoutError: this is no such folder, or there is no such interpreter.
    """

    path: Path
    python: Path
    folder: Path

    def __post_init__(self) -> None:
        missing = [name for name in NEEDED if not (self.path / name).is_file()]
        if missing:
            raise CheckoutError(f"{self.path} is no checkout of FedSEA-LLaMA: it has no {missing[0]}; {COMMAND}")
        if not self.python.is_file():
            raise CheckoutError(f"there is no {self.python}: 'make build/fedsea/ready' makes that environment")

    def train(self, batches: Batches, *, dtype: str, length: int, counted: bool = False) -> Measured:
        """Training steps, one for each batch.

        Args:
            batches: rows that are no longer than ``length``.
            dtype: of weights, of what is computed and of what crosses.
            length: what rows are padded to.
            counted: whether bytes are counted, by a proxy between the two.
        """
        steps, rows = len(batches), len(batches[0])
        name = f"Distributed_Record_train_bs{rows}_step{steps}"
        self._store(name, [[padded(batch, length) for batch in batches]])
        shape = {"max_step": steps, "batch_size": rows, "max_source_length": length - 20, "max_target_length": 20}
        return self._run("do_train", dtype, shape, counted=counted)

    def answer(self, prompt: list[int], tokens: int, *, keep_tokenizer: bool) -> Measured:
        """An answer to one prompt, sampled at its own temperature of 0.1; shorter if it ends by itself.

        Args:
            keep_tokenizer: whether its client, against its own code, loads the tokenizer once and not for each token.
        """
        self._store("Record_central_FullTest", [padded([prompt], len(prompt)) | texts()])
        shape = {"max_predict_samples": 1, "max_output_length": tokens}
        options = ["--keep-tokenizer"] if keep_tokenizer else []
        return self._run("do_predict", "float32", shape, options)

    def _store(self, name: str, batches: object) -> None:
        store = self.folder / "pickle-store"
        store.mkdir(exist_ok=True)
        (store / f"{name}.pickle").write_bytes(pickle.dumps(batches))

    def _run(
        self, what: str, dtype: str, shape: dict[str, int], options: Sequence[str] = (), *, counted: bool = False
    ) -> Measured:
        notes = self.folder / "notes.jsonl"
        notes.unlink(missing_ok=True)
        (self.folder / "output").mkdir(exist_ok=True)
        cut = {"modelA_layers": 1, "modelC_layers": 1}
        values = {"device": "cpu", "torch_dtype": dtype, "output_dir": "output"} | cut | shape
        words = [f"--{what}", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]
        address = f"localhost:{free_port()}"
        with self._started(SERVER, ["none"], [*words, "--server_ip", address]) as server:
            wait_listening(server, address)
            with closing(CountingProxy(address)) as proxy:
                own = [*words, "--from_pickle", "--server_ip", proxy.address if counted else address]
                with self._started(CLIENT, [str(server.pid), *options], own) as client:
                    code = client.wait(LONGEST_SECONDS)
                if code:
                    raise CheckoutError(f"its client ended with {code}: see {self.folder / 'client.log'}")
                return Measured(read(notes), proxy.up, proxy.down)

    @contextmanager
    def _started(self, program: str, options: list[str], words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        notes = self.folder / "notes.jsonl"
        run = [str(self.python), str(INSIDE), str((self.path / program).resolve()), str(notes)]
        command = [*run, *options, "--", *words]
        away = {"PYTHONPATH": "", "FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with (self.folder / ("server.log" if program == SERVER else "client.log")).open("wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=os.environ | away, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def padded(rows: list[list[int]], length: int) -> dict[str, torch.Tensor]:
    """A batch in the form that its client reads: filled up on the left, every token of a row learned."""
    empty = [length - len(row) for row in rows]
    both = list(zip(empty, rows, strict=True))
    return {
        "input_ids": torch.tensor([[PAD] * count + row for count, row in both]),
        "attention_mask": torch.tensor([[0] * count + [1] * len(row) for count, row in both]),
        "labels": torch.tensor([[IGNORED] * count + row for count, row in both]),
    }


def texts() -> dict[str, torch.Tensor]:
    """Names of a row, which its client writes down with an answer."""
    return {"id": torch.tensor([[PAD]]), "turn_id": torch.tensor([[PAD]])}


def wait_listening(server: subprocess.Popen[bytes], address: str) -> None:
    """Until its server has loaded its part and listens."""
    host, _, port = address.partition(":")
    for _ in range(START_SECONDS * 5):
        if server.poll() is not None:
            raise CheckoutError(f"its server ended with {server.returncode}: see server.log beside the notes")
        with socket.socket() as line:
            if line.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)
    raise CheckoutError("its server does not listen: see server.log beside the notes")


def read(notes: Path) -> Notes:
    return [json.loads(line) for line in notes.read_text().splitlines()]
