"""All bytes of a whole training run, against the published format at the same quality.

``make bench-bytes``. MTS-Dialog's conversations and their summaries, three epochs in two silos, which average their
ends every third step. *Published*: hidden states and gradients in all four directions in fp16, padded to the longest
row of the batch (see ``speed.published``), updates in fp32. Its run here has the same steps, with the codec fp16; its
padding, which isthmus does not send, is counted. *Ours*: the bottom rests, so that hidden states leave once; the
trunk's later answers are differences; gradients are range coded; updates have four bits.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.results import Results, note
from benchmarks.common.rows import SHARED, Rows, Values, read
from benchmarks.federated.corpora import rows_file
from benchmarks.federated.simulation import Learned, federate, merged, recipe_of
from benchmarks.federated.tables.uncut import UncutModel
from benchmarks.speed.published import training_step_bytes
from isthmus.data.tokens import Tokens, epochs
from isthmus.demo.assets import smollm2
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal

SILOS = ("first", "second")
ROWS, HELD_OUT = 24, 48
"""Training rows of a silo, and rows of which the loss is measured."""
LONGEST = 700
"""Characters of a summary: with longer ones there is no room for the conversation."""
SEEDS = (1, 2)
BATCH, EPOCHS, ROUNDS = 4, 3, 6
FEWER, WORSE = 97.0, 1.0
"""Goals: % of bytes saved, at least; % of loss lost, at most."""
BASE: Values = {
    "task": {"name": "mts_dialog", "truncate": "middle"},
    "lora": {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]},
    "train": {"batch": BATCH, "epochs": EPOCHS, "rounds": ROUNDS, "max_tokens": 384, "learning_rate": 1e-3},
}
PUBLISHED: Values = {"boundary": {"codec": "fp16"}, "federation": {"lora": "plain"}}
SMALL: Values = {
    "lora": {"freeze_bottom": True},
    "boundary": {
        "release_once": True,
        "differences": True,
        "codec": {"forward_up": "range-0.75", "forward_down": "range-0.75", "gradient_up": "range-2"},
    },
    "federation": {"compression": {"bits": 4}},
}
WAYS = {"published format": PUBLISHED, "range coded": SMALL}


@dataclass(frozen=True)
class Trial:
    """One way, one draw of rows."""

    loss: float
    """Of the held-out rows, nats a token of an answer."""
    bytes: float
    """Of a silo's whole run, in both directions."""
    updates: float
    """Of these: updates and what came for them."""
    tokens: int
    """Of a silo's rows, in one epoch."""


def main() -> None:
    torch.set_num_threads(1)
    results, model = Results("bytes", "make bench-bytes"), smollm2(Path("build/demo")).resolve()
    trials: dict[str, list[Trial]] = {name: [] for name in WAYS}
    for seed in SEEDS:
        for name, changes in WAYS.items():
            trials[name].append(tried(model, name, changes, seed))
            print(f"{name}, seed {seed}: {trials[name][-1]}", flush=True)
    report(results, trials)
    print(f"written: {results.write()}")


def tried(model: Path, name: str, changes: Values, seed: int) -> Trial:
    train, held_out = drawn(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = {silo: rows_file(folder / f"{silo}.jsonl", rows) for silo, rows in train.items()}
        silos = {silo: {"train": file} for silo, file in files.items()}
        recipe = recipe_of(model, silos, merged(merged(BASE, {"seed": seed}), changes))
        learned = federate(recipe, folder)
        uncut = UncutModel(recipe_of(model, silos, merged(BASE, {"seed": seed})), "cpu")
        uncut.load(learned.tensors(ROUNDS))
        loss = uncut.surprise(uncut.rows(rows_file(folder / "held_out.jsonl", held_out)))
        updates = {silo: update_bytes(learned, silo) for silo in SILOS}
        drawn_rows = {silo: [one.tokens for one in uncut.rows(file)] for silo, file in files.items()}
        crossed = {silo: crossed_bytes(learned, silo) for silo in SILOS}
        if name == "published format":
            width = Checkpoint(model).config.hidden_size
            crossed = {silo: published_bytes(recipe, silo, rows, width) for silo, rows in drawn_rows.items()}
        whole = statistics.fmean(crossed[silo] + updates[silo] for silo in SILOS)
        tokens = sum(len(row.input) for rows in drawn_rows.values() for row in rows) // len(SILOS)
        return Trial(loss, whole, statistics.fmean(updates.values()), tokens)


def drawn(seed: int) -> tuple[dict[str, Rows], Rows]:
    """Training rows of each silo, other ones with each seed, and held-out rows, always the same."""
    files = (read(SHARED / "mts_dialog" / f"{name}.jsonl") for name in ("train", "test1"))
    known, unseen = ([row for row in rows if len(row["section_text"]) <= LONGEST] for rows in files)
    chosen = random.Random(f"bytes/{seed}").sample(known, ROWS * len(SILOS))
    own = {silo: chosen[number * ROWS : (number + 1) * ROWS] for number, silo in enumerate(SILOS)}
    return own, unseen[-HELD_OUT:]


def crossed_bytes(learned: Learned, silo: str) -> int:
    """Of all frames between the silo and the trunk."""
    steps = [line for line in lines(learned, silo) if line["event"] == "step"]
    return int(steps[-1]["sent_bytes"] + steps[-1]["received_bytes"])


def update_bytes(learned: Learned, silo: str) -> int:
    """Of a silo's updates, and of the shared adapters that came back."""
    updates = [line for line in lines(learned, silo) if line["event"] == "update"]
    return int(sum(line["own_sent_bytes"] + line["own_received_bytes"] for line in updates))


def lines(learned: Learned, silo: str) -> list[Values]:
    return list(read_journal(learned.run.role(silo).path / "metrics.jsonl"))


def published_bytes(recipe: Recipe, silo: str, rows: list[Tokens], width: int) -> int:
    """Of the same batches, in the published format."""
    batches = epochs(rows, BATCH, f"{recipe.seed}/{silo}")
    count = EPOCHS * -(-len(rows) // BATCH)
    drawn = [[len(row.input) for row in next(batches)] for _ in range(count)]
    return sum(training_step_bytes(lengths, max(lengths), width) for lengths in drawn)


def report(results: Results, trials: dict[str, list[Trial]]) -> None:
    published = trials["published format"]
    for name, own in trials.items():
        note(results, f"{name}: held-out loss", [one.loss for one in own], "nats a token")
        note(results, f"{name}: bytes of a silo's run", [one.bytes / 2**20 for one in own], "MiB")
        note(results, f"{name}: of these its updates", [one.updates / 2**20 for one in own], "MiB")
        note(results, f"{name}: bytes a token and epoch", [one.bytes / one.tokens / EPOCHS for one in own], "bytes")
        if name == "published format":
            continue
        saved = [100 * (1 - mine.bytes / theirs.bytes) for mine, theirs in zip(own, published, strict=True)]
        worse = [100 * (mine.loss / theirs.loss - 1) for mine, theirs in zip(own, published, strict=True)]
        note(results, f"{name}: bytes saved", saved, "%", at_least=FEWER)
        note(results, f"{name}: loss above the published run's", worse, "%", at_most=WORSE)


if __name__ == "__main__":
    main()
