"""isthmus beside FedSEA-LLaMA's own published code, on this CPU. ``make bench-peer-fedsea FEDSEA=path``.

Both sides have the same weights (``model``), the cut (1, 1) of 32 blocks and the same rows, and run in turn, each as
two processes on the same one core with one thread. A ratio is that of the medians; the lowest and the highest are those
of any two runs that came one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.common.results import Results
from benchmarks.common.rows import SHARED, Values, read
from benchmarks.federated.bytes import SMALL
from benchmarks.federated.corpora import rows_file
from benchmarks.speed.peer_fedsea import ours
from benchmarks.speed.peer_fedsea.checkout import COMMAND, Batches, Checkout, CheckoutError, Measured, Notes
from benchmarks.speed.peer_fedsea.model import deepen, divide
from isthmus.data.tokens import Tokens, epochs
from isthmus.demo.assets import smollm2

FOLDER = Path("build/peer_fedsea")
REPEATS = 3
ROW, STEPS = 256, 5
"""Tokens of a full row, and steps of which the first is not timed."""
PROMPT, ANSWER = 512, 24
ROWS, EPOCHS = 8, 3
"""Rows and epochs of the runs whose bytes are counted, in batches of two."""
COUNTED = 2
"""Steps of the other code whose bytes are counted: each pads its rows to the same length, and takes minutes."""
LONGEST = 1600
"""Characters of a row: longer ones may have more tokens than isthmus's default takes."""
DEFAULT_LENGTH = 720
"""What the other code's programs pad rows to unless they are told otherwise."""
LIKE: Values = {
    "model": {"bottom": 1, "top": 1},
    "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "federation": {"lora": "plain"},
    "boundary": {kind: {"noise": 0.0} for kind in ("forward", "gradient", "update")},
    "train": {"steps": 100_000, "learning_rate": 1e-5, "weight_decay": 0.01, "max_grad_norm": 1.0},
}
"""The recipe that computes what the other code does: its cut, adapters and optimizer, fp32, and no noise."""


def main() -> None:
    """All parts, or those that are named: ``train``, ``answer``, ``bytes``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.peer_fedsea")
    parser.add_argument("parts", nargs="*", default=["train", "answer", "bytes"], metavar="train|answer|bytes")
    parser.add_argument("--checkout", type=Path, help="the folder FedSEA-LLaMA of a checkout of its repository")
    parser.add_argument("--python", type=Path, default=Path("build/fedsea/bin/python"))
    options = parser.parse_args()
    if options.checkout is None:
        refuse(f"say where its code is: {COMMAND}")
    try:
        checkout = Checkout(options.checkout.resolve(), options.python.absolute(), (FOLDER / "run").resolve())
        measure(checkout, options.parts)
    except CheckoutError as error:
        refuse(str(error))


def refuse(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def measure(checkout: Checkout, parts: Sequence[str]) -> None:
    """Measure these parts on one core, with one thread in every process, and write them."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    model = deepen(smollm2(Path("build/demo")), FOLDER / "model").resolve()
    if not (checkout.folder / "clientC").exists():
        divide(model, checkout.folder)
    results = Results("peer_fedsea", f"{COMMAND.partition('=')[0]}=…")
    for part in parts:
        {"train": measure_training, "answer": measure_answers, "bytes": measure_bytes}[part](results, checkout, model)
        print(f"written: {results.write(keep=True)}")  # each part takes long


def measure_training(results: Results, checkout: Checkout, model: Path) -> None:
    """Steps on full rows in fp32: the first loss, processor time, wall time and peak memory."""
    recipe, batches = ours.recipe_of(model, LIKE), full_batches(model)
    own, other = in_turn(
        lambda: ours.measured(recipe, batches=batches), lambda: checkout.train(batches, dtype="float32", length=ROW)
    )
    name = f"training step, 2 × {ROW}, fp32"
    first = [one[0].notes[1]["loss"] for one in (own, other)]
    results.add(f"{name}: first loss, isthmus", first[0], "nats a token")
    results.add(f"{name}: first loss, its code", first[1], "nats a token")
    results.add(f"{name}: distance of the first losses", abs(first[0] - first[1]), "nats a token", at_most=0.0001)
    for key, what in (("processor", "processor time"), ("seconds", "wall time")):
        times = [[a_step(one.notes, key) for one in side] for side in (own, other)]
        compare(results, f"{name}: {what}", *times, "s", at_most=0.75 if key == "processor" else None)
    peaks = [[one.notes[-1]["peak"] / 1e6 for one in side] for side in (own, other)]
    compare(results, f"{name}: peak memory of both processes", *peaks, "MB")


def measure_answers(results: Results, checkout: Checkout, model: Path) -> None:
    """Tokens after a prompt: isthmus with caches and with drafts, the other code as it is and with a kept tokenizer."""
    recipe, (prompt,) = ours.recipe_of(model, LIKE), next(texts(model, PROMPT, 1))
    ways: dict[str, Callable[[], Measured]] = {
        "isthmus, caches": lambda: ours.measured(recipe, prompt=prompt, tokens=ANSWER),
        "isthmus, caches and prompt lookup": lambda: ours.measured(recipe, prompt=prompt, tokens=ANSWER, lookup=True),
        "its code": lambda: checkout.answer(prompt, ANSWER, keep_tokenizer=False),
        "its code, tokenizer kept": lambda: checkout.answer(prompt, ANSWER, keep_tokenizer=True),
    }
    runs = dict(zip(ways, in_turn(*ways.values()), strict=True))
    name = f"a token after a prompt of {PROMPT}"
    for key, what in (("seconds", "wall time"), ("processor", "processor time")):
        times = {way: [a_token(one.notes, key) for one in side] for way, side in runs.items()}
        goal = 10 if key == "seconds" else None
        for way, own in list(times.items())[:2]:
            for other in list(times)[2:]:
                text = f"{name}, {what}: {other} / {way}"
                spread(results, text, times[other], own, at_least=goal if other == "its code" else None)
        for way, values in times.items():
            results.add(f"{name}, {what}: {way}", statistics.median(values), "s")
    for way, side in runs.items():
        results.add(f"first token after a prompt of {PROMPT}: {way}", statistics.median(map(first_token, side)), "s")


def measure_bytes(results: Results, checkout: Checkout, model: Path) -> None:
    """Bytes of a training run through the socket: by default, at equal precision on full rows, and with fewest."""
    (rows,) = texts(model, None, ROWS)
    steps = ROWS // 2 * EPOCHS
    file = rows_file(FOLDER / "rows.jsonl", [{"text": text} for text in passages(ROWS)])
    run = {"task": {"text": "{text}"}, "silo": {"train": str(file.resolve())}}
    drawn = epochs([Tokens(row[:1], row[1:]) for row in rows], 2, "bytes")
    batches = [[[*row.prompt, *row.answer] for row in next(drawn)] for _ in range(steps)]
    counted = checkout.train(batches[:COUNTED], dtype="float16", length=DEFAULT_LENGTH, counted=True)
    other = total(counted) * steps / COUNTED
    results.add(f"bytes of {steps} steps, defaults: its code, from {COUNTED}", other / 2**20, "MiB")
    rounds = {"train": {"rounds": steps}}
    for name, changes, goal in (
        ("defaults", {}, 0.15),
        ("fp16", {"boundary": {"codec": "fp16"}}, None),
        ("fewest", SMALL, None),
    ):
        own = ours.whole_run(ours.recipe_of(model, run | rounds | changes))
        results.add(f"bytes of {steps} steps, {name}: isthmus", own / 2**20, "MiB")
        results.add(f"bytes of {steps} steps: isthmus {name} / its defaults", own / other, "ratio", at_most=goal)
    full, recipe = full_batches(model), ours.recipe_of(model, LIKE)
    like = ours.measured(recipe, batches=full, counted=True)
    same = checkout.train(full, dtype="float32", length=ROW, counted=True)
    results.add(f"bytes, full rows of {ROW}, fp32 on both: isthmus / its code", total(like) / total(same), "ratio")


def passages(count: int) -> list[str]:
    """ReCoRD's passages, each with a query and its answer."""
    found = read(SHARED / "superglue_record" / "train32.jsonl")
    every = [
        f"{row['passage']['text']}\n{row['qas'][0]['query']}\n{row['qas'][0]['answers'][0]['text']}" for row in found
    ]
    return [text for text in every if len(text) <= LONGEST][:count]


def texts(model: Path, length: int | None, count: int) -> Iterator[list[list[int]]]:
    """Groups of ``count`` rows of token ids.

    Args:
        length: of each row, cut out of all passages one after another; None: a row is a passage of its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[list[int]] = [tokenizer(text)["input_ids"] for text in passages(ROWS if length is None else 32)]
    if length is not None:
        flat = [token for row in rows for token in row]
        rows = [flat[start : start + length] for start in range(0, len(flat) - length + 1, length)]
    yield from (rows[start : start + count] for start in range(0, len(rows) - count + 1, count))


def full_batches(model: Path) -> Batches:
    return list(itertools.islice(texts(model, ROW, 2), STEPS))


def in_turn(*ways: Callable[[], Measured]) -> list[list[Measured]]:
    """Each way's runs, which came one after another: A B A B …"""
    rounds = [[way() for way in ways] for _ in range(REPEATS)]
    return [list(side) for side in zip(*rounds, strict=True)]


def a_step(notes: Notes, key: str) -> float:
    """The mean of all steps but the first."""
    return float((notes[-1][key] - notes[1][key]) / (len(notes) - 2))


def a_token(notes: Notes, key: str) -> float:
    """The mean of all tokens but those that the first pass brought."""
    return float((notes[-1][key] - notes[1][key]) / sum(line["tokens"] for line in notes[2:]))


def first_token(run: Measured) -> float:
    return float(run.notes[1]["seconds"] - run.notes[0]["seconds"])


def total(run: Measured) -> int:
    return run.sent + run.received


def compare(
    results: Results, name: str, own: list[float], other: list[float], unit: str, *, at_most: float | None = None
) -> None:
    results.add(f"{name}, isthmus", statistics.median(own), unit)
    results.add(f"{name}, its code", statistics.median(other), unit)
    spread(results, f"{name}, isthmus / its code", own, other, at_most=at_most)


def spread(
    results: Results,
    name: str,
    upper: list[float],
    lower: list[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> None:
    """A ratio of medians, against its goal, and the lowest and the highest of single rounds."""
    ratio = statistics.median(upper) / statistics.median(lower)
    results.add(name, ratio, "ratio", at_most=at_most, at_least=at_least)
    each = [one / another for one, another in zip(upper, lower, strict=True)]
    results.add(f"{name}, lowest of {len(each)}", min(each), "ratio")
    results.add(f"{name}, highest of {len(each)}", max(each), "ratio")


if __name__ == "__main__":
    main()
