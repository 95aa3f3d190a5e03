"""The real model of the demo, cut: the same logits, and no part reads another part's tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from isthmus.silo.join import load_tokenizer
from tests.conftest import make_recipe
from tests.oracle.twins import make_twins

TEXTS = ["Gravity is", "The quick brown fox jumps over the lazy dog and then", "What is the capital of France?"]


def test_logits_and_greedy_tokens(smollm2_folder: Path, tmp_path: Path) -> None:
    twins = make_twins(make_recipe(smollm2_folder, model={"bottom": 2, "top": 2}), tmp_path)
    batch = load_tokenizer(smollm2_folder)(TEXTS, return_tensors="pt", padding=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        split, whole = (model(**batch).logits[real] for model in twins.both)
    assert (split - whole).abs().max() <= 1e-4 * whole.abs().max()
    assert torch.equal(split.argmax(dim=-1), whole.argmax(dim=-1))
    split, whole = (model.generate(**batch, max_new_tokens=12, do_sample=False) for model in twins.both)
    assert torch.equal(split, whole)
    twins.close()


def test_parts_share_no_tensor_but_the_tied_embedding(smollm2_folder: Path) -> None:
    checkpoints = {name: Checkpoint(str(smollm2_folder)) for name in ("bottom", "trunk", "top")}
    parts = {name: load_part(checkpoint, Cut(2, 2), name) for name, checkpoint in checkpoints.items()}  # type: ignore[arg-type]
    read = {name: checkpoint.tensors_read for name, checkpoint in checkpoints.items()}
    assert read["bottom"] & read["top"] == {"model.embed_tokens.weight"}
    assert not read["trunk"] & (read["bottom"] | read["top"])
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    embedding = parts["bottom"].config.vocab_size * parts["bottom"].config.hidden_size
    assert sum(sizes.values()) - embedding == 134_515_008
    assert sizes["trunk"] == 26 * 3_540_096
