"""Choices ranked by isthmus beside lm-eval's harness, on one uncut model: time, and that both choose the same.

Both get the same items, each its best setting here: the harness the batch size that is fastest for it of three.
Repeats alternate. ``make bench-scoring``.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.results import Results
from benchmarks.common.rows import SHARED, read
from isthmus.data.encoding import TextEncoder
from isthmus.demo.assets import smollm2
from isthmus.silo.join import load_tokenizer
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.scoring import ChoiceQuestion, best_choices, choice_log_probs
from isthmus.tasks.task import Item

FILES = {
    "copa": ("superglue_copa/val.jsonl", 30),
    "rte": ("superglue_rte/val.jsonl", 16),
    "wic": ("superglue_wic/val.jsonl", 40),
    "record": ("superglue_record/dev32.jsonl", 2),
}
"""A file of each task, and its first rows that are scored."""
REPEATS = 3
BATCHES = (1, 4, 16)
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    folder = smollm2(Path("build/demo"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    results = Results("scoring", "make bench-scoring")
    for name, (file, count) in FILES.items():
        items = [item for row in read(SHARED / file)[:count] for item in named_task(name).items(row)]
        measure(results, name, items, lambda some: ours(model, tokenizer, some), Harness(model, tokenizer))
    print(f"written: {results.write()}")


def measure(
    results: Results,
    name: str,
    items: list[Item],
    score: Callable[[Sequence[Item]], list[int]],
    harness: Harness,
) -> None:
    part = items[: max(4, len(items) // 4)]
    size = min(BATCHES, key=lambda one: timed(lambda: harness.choices(part, one))[0])
    mine, theirs = [], []
    for _ in range(REPEATS):
        seconds, found = timed(lambda: score(items))
        mine.append(seconds)
        seconds, known = timed(lambda: harness.choices(items, size))
        theirs.append(seconds)
    label = f"{name}, {len(items)} questions, {sum(len(item.choices) for item in items)} choices"
    results.add(f"{label}: harness, batch {size}", statistics.median(theirs), "s")
    results.add(f"{label}: isthmus", statistics.median(mine), "s")
    results.add(f"{label}: isthmus, range of {REPEATS} repeats", max(mine) - min(mine), "s")
    ratio = statistics.median(mine) / statistics.median(theirs)
    results.add(f"{name}: time beside the harness", ratio, "×", at_most=1.0)
    same = sum(one == other for one, other in zip(found, known, strict=True)) / len(items)
    results.add(f"{name}: same choice", 100 * same, "%", at_least=100.0)


def timed(run: Callable[[], list[int]]) -> tuple[float, list[int]]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def ours(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[int]:
    encoder = TextEncoder(tokenizer)
    asked = [
        ChoiceQuestion(encoder.prompt(item.prompt).ids, [encoder.answer(choice).ids for choice in item.choices])
        for item in items
    ]
    return best_choices(choice_log_probs(model, asked), [item.choices for item in items], "total")


class Harness:
    """lm-eval's model, asked for the log-likelihoods that its multiple-choice tasks ask for."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def choices(self, items: Sequence[Item], size: int) -> list[int]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=self._model, tokenizer=self._tokenizer, batch_size=size, device="cpu")
        asked = [
            Instance("loglikelihood", {}, (item.prompt, choice), number)
            for item in items
            for number, choice in enumerate(item.choices)
        ]
        scores = [score for score, _ in model.loglikelihood(asked, disable_tqdm=True)]
        best = []
        for item in items:
            own, scores = scores[: len(item.choices)], scores[len(item.choices) :]
            best.append(max(range(len(own)), key=own.__getitem__))
        return best


if __name__ == "__main__":
    main()
