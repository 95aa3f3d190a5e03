"""Drafts inside the silo: tokens a round trip, and tokens a second over a long way. ``make bench-draft``.

SmolLM2 is fine-tuned on clinical dialogues (MTS-Dialog) by a federation of one silo, its draft distilled from its
answers to the training prompts, and held-out prompts are answered by four ways in turn. Model and draft stay in
build/draft.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.proxy import CountingProxy
from benchmarks.common.results import Results
from isthmus.data.silo_data import SiloData
from isthmus.demo.assets import smollm2
from isthmus.engines.inference import load_draft, make_draft
from isthmus.engines.local import at_address, create_run, run_federation, serving
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.drafting.draft import EXPECTED, Draft
from isthmus.silo.drafting.draft_file import DRAFT_FILE
from isthmus.silo.drafting.draft_length import AcceptanceRate
from isthmus.silo.join import Silo, connect_silo, load_shared, load_tokenizer
from isthmus.silo.served import SharedAdapters
from isthmus.storage.record import RunDirectory

DATA = Path(os.environ.get("ISTHMUS_DATA", "../shared/data")) / "mts_dialog"
CACHE = Path("build/draft")
ROUND_TRIP = 0.080
PROMPTS, LONGEST = 32, 96
DIALOGUE, NOTE = 256, 128
"""Longest rows, in tokens."""
LOOKED_UP = 8
"""Tokens that prompt lookup alone sends ahead."""
ROUNDS, STEPS = 4, 30
Ask = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    if not DATA.is_dir():
        sys.exit(f"no MTS-Dialog in {DATA}: set ISTHMUS_DATA to the folder that holds mts_dialog/train.jsonl")
    results = Results("draft", "make bench-draft")
    run = prepared(results)
    recipe = run.recipe()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the trunk's process too: a core each, as if they were two machines
    with serving(run) as (_, address):
        proxy, ledger = CountingProxy(address, ROUND_TRIP / 2), MemoryLedger()
        silo = connect_silo(at_address(recipe, proxy.address), "clinic", ledger=ledger)
        load_shared(silo, SharedAdapters(ROUNDS, "", run.role("root").load_round(ROUNDS)["shared"]))
        rows = random.Random(0).sample(SiloData(recipe.party("clinic"), recipe, silo.tokenizer).held_out, PROMPTS)
        measured = measure(silo, ledger, ways(run, silo), [torch.tensor([row.prompt]) for row in rows])
        silo.close()
        proxy.close()
    report(results, measured)
    print(f"written: {results.write()}")


def prepared(results: Results) -> RunDirectory:
    """The fine-tuned run with its draft, made if it is not there."""
    recipe, path = clinic_recipe(smollm2(Path("build/demo")).resolve()), CACHE / "run"
    if path.exists() and RunDirectory.open(path).recipe().model != recipe.model:
        shutil.rmtree(path)
    run = RunDirectory.open(path) if path.exists() else create_run(recipe, path)
    if run.completed() < ROUNDS:
        started = time.perf_counter()
        run_federation(run)
        results.add("fine-tuning", time.perf_counter() - started, "s")
    if not (run.role("clinic").path / DRAFT_FILE).exists():
        started = time.perf_counter()
        make_draft(run, None, prompts=10_000, max_new_tokens=64, notify=lambda message: print(message, flush=True))
        results.add("distilling", time.perf_counter() - started, "s")
    return run


def clinic_recipe(model: Path) -> Recipe:
    """One silo with the short rows of the training set, and those of validation and first test set held out."""
    tokenizer = load_tokenizer(model)
    folder = CACHE.resolve()
    write_rows(folder / "train.jsonl", ["train"], tokenizer)
    write_rows(folder / "held_out.jsonl", ["val", "test1"], tokenizer)
    return Recipe.of(
        {
            "model": {"path": str(model), "bottom": 2, "top": 2},
            "lora": {"rank": 16, "alpha": 32.0, "targets": ["q_proj", "v_proj", "o_proj"]},
            "train": {
                "rounds": ROUNDS,
                "steps": STEPS,
                "batch": 4,
                "learning_rate": 2e-3,
                "max_tokens": 512,
                "evaluate": False,
            },
            "task": {"prompt": "{dialogue}\n\nClinical note, section {section_header}:", "answer": "{section_text}"},
            "boundary": {path: {"noise": 0.0} for path in ("forward", "gradient", "update")},
            "silo": [
                {
                    "name": "clinic",
                    "train": str(folder / "train.jsonl"),
                    "held_out": str(folder / "held_out.jsonl"),
                }
            ],
        }
    )


def write_rows(path: Path, splits: list[str], tokenizer: Any) -> None:
    """The rows of these splits that are short enough, as JSONL."""
    lines = []
    for split in splits:
        for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            dialogue, note = row["dialogue"].replace("\r\n", "\n").strip(), row["section_text"].strip()
            sizes = [len(tokenizer(text)["input_ids"]) for text in (dialogue, note)]
            if 0 < sizes[0] <= DIALOGUE and 0 < sizes[1] <= NOTE:
                kept = {"section_header": row["section_header"], "dialogue": dialogue, "section_text": f" {note}"}
                lines.append(json.dumps(kept) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def ways(run: RunDirectory, silo: Silo) -> dict[str, Ask]:
    """Four ways of answering greedily, the plain one first."""
    settings = {"max_new_tokens": LONGEST, "do_sample": False, "pad_token_id": silo.tokenizer.pad_token_id}
    drafts: list[Draft] = []
    for _ in range(2):
        draft = load_draft(run.role("clinic"), silo)
        assert draft is not None
        drafts.append(draft)
    for name in drafts[1].sources.rates:
        if name.startswith(EXPECTED):
            drafts[1].sources.rates[name] = AcceptanceRate(0.0, 40.0)  # the bridge is never used

    def by(**way: Any) -> Ask:
        return lambda ids_1L: silo.model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), **settings, **way)

    return {
        "plain": by(),
        "prompt lookup": by(prompt_lookup_num_tokens=LOOKED_UP),
        "drafts": by(assistant_model=drafts[0]),
        "drafts without the bridge": by(assistant_model=drafts[1]),
    }


@dataclass(frozen=True)
class Measured:
    """One answer by one way."""

    tokens: int
    trips: int
    """Frames that left the silo, the prompt's included."""
    seconds: float
    same: bool
    """As the plain answer, token by token."""
    ended: bool
    """By itself, before ``LONGEST`` tokens: what runs on is a loop, which any lookup guesses."""


def measure(
    silo: Silo, ledger: MemoryLedger, asks: dict[str, Ask], prompts: list[torch.Tensor]
) -> dict[str, list[Measured]]:
    """Each prompt by each way, in turn."""
    found: dict[str, list[Measured]] = {name: [] for name in asks}
    for ask in asks.values():
        ask(prompts[0])  # warm-up
    for number, ids_1L in enumerate(prompts, 1):
        plain: list[int] = []
        for name, ask in asks.items():
            trips, started = len(ledger.releases), time.perf_counter()
            answer = ask(ids_1L)[0, ids_1L.shape[1] :].tolist()
            seconds = time.perf_counter() - started
            plain = plain or answer
            ended = plain[-1] == silo.tokenizer.eos_token_id
            one = Measured(len(answer), len(ledger.releases) - trips, seconds, answer == plain, ended)
            found[name].append(one)
        print(number, [f"{len(plain)} tokens", *(rows[-1].trips for rows in found.values())], flush=True)
    return found


def report(results: Results, measured: dict[str, list[Measured]]) -> None:
    plain = measured["plain"]
    results.add("answers", len(plain), "answers")
    results.add("answers that ended by themselves", sum(one.ended for one in plain), "answers")
    for name, rows in measured.items():
        same = sum(one.same for one in rows) / len(rows)
        results.add(f"{name}: answers token-identical to plain", same, "share", at_least=1.0)
        for which, kept in (("all answers", rows), ("ended", [one for one in rows if one.ended])):
            tokens, trips = sum(one.tokens for one in kept), sum(one.trips for one in kept)
            goal = 1.8 if name == "drafts" else None
            results.add(f"{name}, {which}: tokens a round trip", tokens / trips, "tokens", at_least=goal)
            each = statistics.median(one.tokens / one.trips for one in kept)
            results.add(f"{name}, {which}: median answer", each, "tokens")
            rate = tokens / sum(one.seconds for one in kept)
            results.add(f"{name}, {which}: at {ROUND_TRIP * 1e3:.0f} ms", rate, "tokens/s")


if __name__ == "__main__":
    main()
