"""stories260k after some school: it has learned to route requests on five other topics, so that a short federation can
teach it new ones.

By itself it knows short stories, and takes a hundred steps to notice what a request is about.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.tasks import SHARED, Rows, read
from isthmus.silo.data import batches, collate, tokenize
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import train_step
from isthmus.tasks.prompts import Example

PROMPT = "{text}\nTopic:"
OTHERS = ("utility", "credit_cards", "home", "small_talk", "meta")
"""In the order of the letters that the federation uses, too, for the topics nearest to them."""
LETTERS = "abcde"
STEPS, BATCH, RATE = 150, 32, 2e-3


@cache
def schooled(base: Path) -> Path:
    """The folder of the model, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="isthmus-schooled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    examples = [Example(PROMPT.format(**row), LETTERS[OTHERS.index(row["domain"])]) for row in rows()]
    tokens = tokenize(examples, tokenizer, 96, free_text=False)
    for drawn in islice(batches(tokens, BATCH, "school"), STEPS):
        train_step(model, optimizer, collate(drawn, 0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows() -> Rows:
    read_rows = [row for row in read(SHARED / "clinc150" / "train.jsonl") if row["domain"] in OTHERS]
    return random.Random(0).sample(read_rows, len(read_rows))
