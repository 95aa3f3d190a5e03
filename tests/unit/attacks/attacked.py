"""Made-up rows for the attacks, and how a test asks for an attacked federation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from isthmus.attacks.view.view import View
from isthmus.data.tokens import Tokens
from tests.conftest import VOCABULARY

Truth = list[list[int]]
Attacked = Callable[..., tuple[View, Truth]]


def random_rows(count: int, seed: int, longest: int = 12) -> list[Tokens]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=draw).tolist()
    texts = [torch.randint(4, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return [Tokens(text[:-1], text[-1:]) for text in texts]


def say(ids: list[int]) -> str:
    """Tokens as words."""
    return " ".join(f"w{token}" for token in ids)
