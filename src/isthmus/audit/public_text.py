"""Public text that an adversary learns from: a file of its own, or drawn from the public model."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.attacks.knowledge import public_model
from isthmus.errors import AttackError

SAMPLED = 256
"""Rows that are drawn from the public model for an adversary without text of its own."""
SAMPLED_TOKENS = 48


def lines_of(path: Path) -> list[str]:
    """The file's rows, one a line.

    Raises:
        AttackError: it cannot be read, or holds none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AttackError(f"cannot read {path}", remedy="give --public a UTF-8 file, a row a line") from error
    if not lines:
        raise AttackError(f"{path} holds no text", remedy="give --public a UTF-8 file, a row a line")
    return lines


@torch.no_grad()
def sampled(folder: Path, seed: int, count: int, length: int = SAMPLED_TOKENS) -> list[list[int]]:
    """Text drawn from the public model, in tokens; each row begins with a random one."""
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
