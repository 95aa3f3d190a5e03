"""Compressed adapter updates: the bytes of one, open and under masks, and what a federated regression loses by it.

A part of ``make bench-federation``. Quality of a real model is measured elsewhere.

Shapes: N silos, R rows, F features, P parameters, K numbers that cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common.results import Results
from isthmus.recipe import FederationSection
from isthmus.updates.compression import Compression, ErrorFeedback
from isthmus.updates.flat import Layout

PARAMETERS = 460_800
"""Of a rank-8 adapter on all projections of SmolLM2-135M's two ends, about."""
SILOS, ROUNDS = 10, 30
FEATURES, CLASSES, ROWS, HELD_OUT = 512, 4, 200, 4000
RATE, STEPS = 0.5, 5


@dataclass(frozen=True)
class Way:
    """A compression, and how many times smaller than fp32 it is to be."""

    name: str
    bits: int | None
    keep: float = 0.05
    at_least: float | None = 20.0

    def of(self, *, masks: bool) -> Compression:
        values = {"compression": {"kind": self.name, "bits": self.bits, "keep": self.keep}, "secure": masks}
        return Compression(FederationSection.model_validate(values), seed=0)

    def __str__(self) -> str:
        kept = "all" if self.name == "none" else f"{self.name} {100 * self.keep:g} %"
        return f"{kept}, {self.bits or 'all'} bits"


OPEN = (
    Way("none", None, at_least=None),
    Way("none", 8, at_least=None),
    Way("none", 4, at_least=None),
    Way("top-k", 16, 0.02),
    Way("top-k", 8, 0.05),
    Way("random-k", 16, 0.05),
    Way("random-k", 8, 0.1),
    Way("random-k", 4, 0.2),
    Way("sketch", 8, 0.1),
    Way("sketch", 4, 0.2),
)
MASKED = (
    Way("none", None, at_least=None),
    Way("none", 4, at_least=None),
    Way("random-k", 16, 0.05),
    Way("random-k", 8, 0.095),
    Way("random-k", 4, 0.19),
    Way("sketch", 8, 0.095),
    Way("sketch", 4, 0.19),
)


def measure(results: Results) -> None:
    row_P = 0.05 * torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(0))
    plain = regression(None, masks=False)
    results.add(f"regression, {SILOS} silos × {ROUNDS} rounds: accuracy with fp32 updates", plain, "%")
    for masks, ways in ((False, OPEN), (True, MASKED)):
        how = f"under masks of {SILOS} silos" if masks else "open"
        for way in ways:
            smaller = 4 * PARAMETERS / size(way.of(masks=masks), row_P, masks=masks)
            results.add(f"update, {how}, {way}: smaller than fp32", smaller, "×", at_least=way.at_least)
            lost = plain - regression(way, masks=masks)
            results.add(f"regression, {how}, {way}: accuracy lost", lost, "points", at_most=0.5)


def size(compression: Compression, row_P: torch.Tensor, *, masks: bool) -> int:
    """Payload bytes of one update of this row."""
    if masks:
        ring = compression.ring(SILOS)
        return ring.width * ring.words(compression.sum_format(Layout({"w": tuple(row_P.shape)}), 1, SILOS).size)
    compressor = compression.compressor(len(row_P), 1)
    return 4 * len(row_P) if compressor is None else len(compressor.encode(row_P))


def regression(way: Way | None, *, masks: bool) -> float:
    """Held-out accuracy in percent after all rounds of federated logistic regression on silos that differ."""
    draw = torch.Generator().manual_seed(1)
    truth_FC = torch.randn(FEATURES, CLASSES, generator=draw) * (torch.rand(FEATURES, 1, generator=draw) < 0.1)
    sizes_F = torch.rand(FEATURES, generator=draw).exp()

    def rows(count: int, shift_F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_RF = (torch.randn(count, FEATURES, generator=draw) + shift_F) * sizes_F
        noise_RC = torch.randn(count, CLASSES, generator=draw)
        return x_RF, (x_RF @ truth_FC + noise_RC).argmax(1)

    silos = [rows(ROWS, 0.3 * torch.randn(FEATURES, generator=draw)) for _ in range(SILOS)]
    x_RF, told_R = rows(HELD_OUT, torch.zeros(FEATURES))
    compression = way.of(masks=masks) if way else Compression()
    rests = [compression.feedback() for _ in silos]
    shared_P = torch.zeros(FEATURES * CLASSES)
    for round in range(1, ROUNDS + 1):
        changes = [learned(shared_P, *silo) for silo in silos]
        due = [rest.added("w", one) if rest else one for rest, one in zip(rests, changes, strict=True)]
        shared_P = shared_P + (summed if masks else opened)(compression, round, due, rests) / SILOS
    return 100 * float(((x_RF @ shared_P.view(FEATURES, CLASSES)).argmax(1) == told_R).float().mean())


def learned(shared_P: torch.Tensor, x_RF: torch.Tensor, told_R: torch.Tensor) -> torch.Tensor:
    """The change of the parameters by some steps on a silo's rows."""
    own_P = shared_P.clone().requires_grad_(True)
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(x_RF @ own_P.view(FEATURES, CLASSES), told_R)
        (gradient_P,) = torch.autograd.grad(loss, own_P)
        own_P = (own_P - RATE / STEPS * gradient_P).detach().requires_grad_(True)
    return own_P.detach() - shared_P


def opened(
    compression: Compression, round: int, due: list[torch.Tensor], rests: Sequence[ErrorFeedback | None]
) -> torch.Tensor:
    """The sum of what crosses of what is due, each by itself."""
    compressor = compression.compressor(len(due[0]), round)
    if compressor is None:
        return torch.stack(due).sum(0)
    crossed = [compressor.decode(compressor.encode(due_P)) for due_P in due]
    for rest, due_P, crossed_P in zip(rests, due, crossed, strict=True):
        if rest is not None:
            rest.keep("w", due_P - crossed_P)
    return torch.stack(crossed).sum(0)


def summed(
    compression: Compression, round: int, due: list[torch.Tensor], rests: Sequence[ErrorFeedback | None]
) -> torch.Tensor:
    """The same, summed in the ring; the masks, which cancel, are left out."""
    sums = compression.sum_format(Layout({"w": tuple(due[0].shape)}), round, SILOS)
    whole = [sums.encode(due_P, 1.0) for due_P in due]
    for rest, due_P, whole_K in zip(rests, due, whole, strict=True):
        if rest is not None:
            rest.keep("w", due_P - sums.decode(whole_K, 1.0))
    total_K = np.add.reduce(np.stack(whole), dtype=np.int64)
    return sums.lift(torch.from_numpy(sums.ring.decode(total_K[: sums.count])).float())
