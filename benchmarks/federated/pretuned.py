"""stories260k, tuned on a few public rows of the task first, as a federation may begin.

By itself it knows short stories, and takes a hundred steps to notice what a request is about.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.rows import SHARED, Rows, read
from isthmus.data.templates import Example
from isthmus.data.tokens import batches, collate, tokenize
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import train_step

PROMPT = "{text}\nTopic:"
TOPICS = ("auto_and_commute", "banking", "kitchen_and_dining", "travel", "work")
LETTERS = "abcde"
STEPS, BATCH, RATE = 60, 32, 2e-3


@cache
def pretuned(base: Path) -> Path:
    """The folder of the model, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="isthmus-pretuned-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    examples = [Example(PROMPT.format(**row), row["label"]) for row in labelled("val")]
    tokens = tokenize(examples, tokenizer, 96, free_text=False)
    for drawn in islice(batches(tokens, BATCH, "school"), STEPS):
        train_step(model, optimizer, collate(drawn, 0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def labelled(split: str) -> Rows:
    """CLINC150's requests on the topics, each with its topic's letter."""
    return [
        {**row, "label": LETTERS[TOPICS.index(row["domain"])]}
        for row in read(SHARED / "clinc150" / f"{split}.jsonl")
        if row["domain"] in TOPICS
    ]
