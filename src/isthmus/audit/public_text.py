"""Public text that an adversary learns from: lines of a file, or samples from the public model."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.attacks.knowledge import public_model
from isthmus.errors import AttackError

PUBLIC_REMEDY = "give --public a UTF-8 text file with one row per line"
SAMPLED_ROWS = 256
"""Most rows that are sampled from the public model for an adversary without a file of text."""
SAMPLED_TOKENS = 48
"""Tokens of a sampled row, without its random first token."""


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank.

    Raises:
        AttackError: the file cannot be read or has no such line.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AttackError(f"cannot read {path}", remedy=PUBLIC_REMEDY) from error
    if not lines:
        raise AttackError(f"{path} holds no text", remedy=PUBLIC_REMEDY)
    return lines


@torch.no_grad()
def sample_public_text(folder: Path, seed: int, count: int, length: int = SAMPLED_TOKENS) -> list[list[int]]:
    """Rows of tokens sampled from the public model. torch's global random state is unchanged.

    Args:
        folder: the public model's.
        count: number of rows.
        length: tokens that follow a row's first token, which is drawn uniformly from the vocabulary.
    """
    model = public_model(folder)
    rows: list[list[int]] = []
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        while len(rows) < count:
            ids_B1 = torch.randint(model.config.vocab_size, (min(64, count - len(rows)), 1))
            ids_BL = model.generate(
                ids_B1,
                attention_mask=torch.ones_like(ids_B1),
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )
            rows += ids_BL.tolist()
    finally:
        torch.set_rng_state(state)
    return rows
