"""How far one must read to follow one training step, one adapter update and one decoded token. ``make bench-walks``.

A walk is the sequence of isthmus functions that one silo's thread calls, as ``sys.setprofile`` reports them. A lambda
and each resumption of a generator are calls; comprehensions are not, nor is what Python generates (a dataclass's
methods). Three figures describe a walk: its calls, the distinct files in which the called functions stand, and its
changes of file, the pairs of consecutive calls that stand in two files.

All parties are in this process, with a random model of four small blocks, and talk over loopback channels. The recipe
is the smallest there is: every optional feature is off, and the boundary has its default clip and noise. Counted is
the last round, when everything that is made once has been made:

- *step*: from the choice of the rows to the end of the optimizer step and the trunk's answer to ``commit``. The trunk
  runs on threads of its own and is not counted, but for the loopback's check of each request.
- *open update*: from new minus old to the end of ``send``, of a silo whose update is not the round's last. Its walk
  has what the root does before it answers.
- *masked update*: the same of the silo whose update is the last of three. Its walk goes on through the root, which
  takes the masks off the sum and makes the next adapters, until ``send`` ends.
- *the silo's part* of an update: the same with the root on threads of its own, so that only the silo's code is counted.
- *decoded token*: one more token of greedy generation.

``python -m benchmarks.speed.walks --list`` prints the walks call by call.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from google.protobuf.message import Message
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import isthmus
from benchmarks.common.results import Results
from isthmus.engines.certificates import make_certificates
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting, join
from isthmus.silo.rounds_client import RoundsClient
from isthmus.silo.update import AggregatorClient
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, Service

SOURCE = str(Path(isthmus.__file__).parent) + "/"
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}
SILOS, MEASURED = ("a", "b", "c"), "a"
WORDS = 97
ROUNDS, STEPS = 2, 2
FEW, MANY = 4, 12
"""Tokens that are generated; the difference of both walks is that of eight tokens."""


def main() -> None:
    results = Results("walks", "make bench-walks")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model")
        walks = {
            "step": step_walk(folder),
            "open update": update_walk(folder, masks=False, turn="first"),
            "open update, the silo's part": update_walk(folder, masks=False, turn="apart"),
            "masked update": update_walk(folder, masks=True, turn="last"),
            "masked update, the silo's part": update_walk(folder, masks=True, turn="apart"),
        }
        tokens = decoded_calls(folder)
    if "--list" in sys.argv[1:]:
        for name, walk in walks.items():
            print(f"\n{name}", *walk.calls, sep="\n  ")
        return
    goals = {"step": (148, 13, 66), "open update": (None, 14, None), "masked update": (None, 24, None)}
    for name, walk in walks.items():
        calls, files, changes = goals.get(name, (None, None, None))
        results.add(f"{name}: calls", len(walk.calls), "calls", at_most=calls)
        results.add(f"{name}: files", walk.files, "files", at_most=files)
        results.add(f"{name}: changes of file", walk.changes, "changes", at_most=changes)
    results.add("decoded token: calls", tokens, "calls")
    print(f"written: {results.write()}")


@dataclass(frozen=True)
class Call:
    """One call: its function's file below ``isthmus/``, and its qualified name."""

    file: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


@dataclass(frozen=True)
class Walk:
    """The calls of one thread, in their order."""

    calls: list[Call]

    @property
    def files(self) -> int:
        """Distinct files."""
        return len({call.file for call in self.calls})

    @property
    def changes(self) -> int:
        """Pairs of consecutive calls in two files."""
        return sum(before.file != after.file for before, after in zip(self.calls, self.calls[1:], strict=False))


class Recorder:
    """Records this thread's calls between the call of one function and the return of another.

    Args:
        first: the function whose call begins a walk; None: a walk begins at once.
        last: the function whose return ends it.
    """

    def __init__(self, first: Callable[..., Any] | None = None, last: Callable[..., Any] | None = None) -> None:
        self._first, self._last = _code(first), _code(last)
        self._calls: list[Call] | None = [] if first is None else None
        self.walks: list[Walk] = []

    def __enter__(self) -> Recorder:
        sys.setprofile(self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        if self._first is None and self._calls is not None:
            self.walks.append(Walk(self._calls))

    def _notice(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(SOURCE) or code.co_name in COMPREHENSIONS:
            return
        if event == "call":
            if self._calls is None and code is self._first:
                self._calls = []
            if self._calls is not None:
                self._calls.append(Call(code.co_filename.removeprefix(SOURCE), code.co_qualname))
        elif event == "return" and code is self._last and self._calls is not None:
            self.walks.append(Walk(self._calls))
            self._calls = None


def _code(function: Callable[..., Any] | None) -> CodeType | None:
    return None if function is None else function.__code__


class Apart:
    """A service whose requests are handled on a thread of its own."""

    def __init__(self, service: Service) -> None:
        self._service, self._thread = service, ThreadPoolExecutor(1)

    def handle(self, peer: str, request: Message) -> Answer:
        answer: Answer = Answer()

        def settle(done: Answer) -> None:
            if (error := done.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())

        def begin() -> None:
            try:
                self._service.handle(peer, request).add_done_callback(settle)
            except Exception as error:
                answer.set_exception(error)

        self._thread.submit(begin)
        return answer


class Turns:
    """Lets the measured silo's messages of each kind go before all others', or after them, round by round."""

    def __init__(self, turn: Literal["first", "last", "apart"]) -> None:
        self._turn, self._changed = turn, threading.Condition()
        self._sent: Counter[tuple[str, int, bool]] = Counter()

    def wait(self, peer: str, request: pb.Update | pb.Reveal) -> None:
        kind, round, measured = type(request).__name__, request.round, peer == MEASURED
        due = {"first": (True, 1), "last": (False, len(SILOS) - 1), "apart": (True, 0)}[self._turn]
        with self._changed:
            if measured != due[0]:
                self._changed.wait_for(lambda: self._sent[kind, round, due[0]] >= due[1])

    def sent(self, peer: str, request: pb.Update | pb.Reveal) -> None:
        with self._changed:
            self._sent[type(request).__name__, request.round, peer == MEASURED] += 1
            self._changed.notify_all()


class InTurn(LoopbackChannel):
    """A loopback channel to the root whose updates and revealed shares wait for their turn."""

    def __init__(self, service: Service, peer: str, turns: Turns) -> None:
        super().__init__(service, peer)
        self._silo, self._turns = peer, turns

    def submit(self, request: Message) -> Answer:
        if not isinstance(request, pb.Update | pb.Reveal):
            return super().submit(request)
        self._turns.wait(self._silo, request)
        answer = super().submit(request)
        self._turns.sent(self._silo, request)
        return answer


def step_walk(folder: Path) -> Walk:
    """The last training step of a federation of one silo."""
    return federate(folder, Worker._step, RoundsClient.commit, silos=SILOS[:1])


def update_walk(folder: Path, *, masks: bool, turn: Literal["first", "last", "apart"]) -> Walk:
    """The last update of one of three silos."""
    return federate(folder, Worker._change, AggregatorClient.send, silos=SILOS, masks=masks, turn=turn)


def federate(
    folder: Path,
    first: Callable[..., Any],
    last: Callable[..., Any],
    *,
    silos: tuple[str, ...],
    masks: bool = False,
    turn: Literal["first", "last", "apart"] = "apart",
) -> Walk:
    """Run a federation, a thread a silo; returns the last walk of the measured silo between these functions."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        recipe = tiny_recipe(folder, Path(temporary), silos, masks=masks)
        run = RunDirectory.create(Path(temporary) / "run", recipe)
        trunk, turns = TrunkService(recipe, run.role("trunk")), Turns(turn)
        root: Service = root_service(recipe, run.role("root"))
        if turn == "apart":
            root = Apart(root)
        recorder = Recorder(first, last)
        hello = greeting(Checkpoint(recipe.model.path), recipe)

        def silo(name: str) -> None:
            way = LoopbackChannel(Apart(trunk), name, greeting=hello)
            worker = Worker(recipe, name, run.role(name), trunk=way, root=InTurn(root, name, turns))
            if name == MEASURED:
                with recorder:
                    worker.run()
            else:
                worker.run()
            worker.close()

        with ThreadPoolExecutor(len(silos)) as threads:
            list(threads.map(silo, silos))
        trunk.stop()
    return recorder.walks[-1]


def decoded_calls(folder: Path) -> float:
    """Calls of one more token of greedy generation with a cache."""
    recipe = tiny_recipe(folder, folder, SILOS[:1], masks=False)
    run = RunDirectory.create(folder / "decoding", recipe)
    trunk = TrunkService(recipe, run.role("trunk"))
    way = LoopbackChannel(Apart(trunk), MEASURED, greeting=greeting(Checkpoint(recipe.model.path), recipe))
    silo = join(recipe, MEASURED, channel=way)
    prompt = torch.arange(4, 12).unsqueeze(0)

    def calls(tokens: int) -> int:
        with Recorder() as recorder:
            silo.model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return len(recorder.walks[0].calls)

    calls(FEW)
    per_token = (calls(MANY) - calls(FEW)) / (MANY - FEW)
    silo.close()
    trunk.stop()
    return per_token


def tiny_recipe(model: Path, folder: Path, silos: tuple[str, ...], *, masks: bool) -> Recipe:
    """A recipe with nothing optional, its rows and certificates written to the folder."""
    rows = [{"text": f"w{number + 5} w{number + 9} w7", "label": f"w{number + 20}"} for number in range(8)]
    for name in silos:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.of(
        {
            "model": {"path": str(model / "model"), "bottom": 1, "top": 1},
            "task": {"prompt": "{text}", "answer": " {label}"},
            "train": {"rounds": ROUNDS, "steps": STEPS, "batch": 2, "evaluate": False},
            "federation": {"secure": masks},
            "wire": {"certificates": str(folder / "certificates")},
            "silo": [{"name": name, "train": str(folder / f"{name}.jsonl")} for name in silos],
        }
    )
    make_certificates(recipe, folder / "certificates")
    return recipe


def save_model(folder: Path) -> None:
    """Write a random Llama of four blocks, 32 wide, with a tokenizer of 97 words."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
