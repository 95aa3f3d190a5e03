"""The guard: teaches bottom and the bottleneck to let the answer cross, and little else.

Beside the task's own loss it weighs what crosses as the trunk will see it, clipped and noised: how well that tells the
answer, against how much it tells of the text. The latter is bounded from below by what a simulated inverter reads
(Barber and Agakov 2003), and from above by what the channel can carry. All of this stays in the silo.

Shapes: B rows, L positions, T vectors that cross, D the model's width, W what crosses of it, V vocabulary,
E width of the embedding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isthmus.model.bottleneck import Bottleneck
from isthmus.model.crossing import IGNORED
from isthmus.model.packing import Packing
from isthmus.privacy.dependence import capacity, distance_correlation
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import DefenceSection
from isthmus.silo.boundary import Boundary
from isthmus.silo.defence.reader import Question, Reader

LESSONS = 3
"""Steps of the readers for each of bottom's."""
LEARNING_RATE = 2e-3
COMPARED = 512
"""Vectors, at most, whose distances are compared."""
OWN, ANY, ANSWER = "own", "any", "answer"
"""What readers are asked: a vector's own token, any token of its text so far, the token that should follow."""


@dataclass(frozen=True)
class Told:
    """What the last step's crossing told: nats a vector but for the correlation, which is 0 to 1."""

    answer: float = 0.0
    """Loss of the head that has nothing but what crosses."""
    inverter: float = 0.0
    """Read of the vector's own token and of one token of its text, together."""
    capacity: float = 0.0
    correlation: float = 0.0


class Guard:
    """Implements ``model.split.Guard`` by the recipe's weights.

    Args:
        table_VE: the model's embedding.
        seed: of the readers and of what they are asked.
    """

    def __init__(
        self,
        section: DefenceSection,
        boundary: Boundary,
        bottleneck: Bottleneck | None,
        table_VE: torch.Tensor,
        seed: int,
    ) -> None:
        self._section, self._seed = section, seed
        self._boundary, self._bottleneck = boundary, bottleneck
        self._table_VE = table_VE.detach().float()
        self._draw = random.Random(f"{seed}/guard")
        self._readers = nn.ModuleDict()
        self._optimizer: torch.optim.Optimizer | None = None
        self.told = Told()

    def __call__(
        self,
        h_BLD: torch.Tensor,
        packing: Packing,
        rows: list[list[int]],
        targets_T: torch.Tensor,
        subjects: Subjects,
        share: float = 1.0,
    ) -> torch.Tensor:
        """``h_BLD`` itself; whatever gradient it gets, that of the guard's terms, times ``share``, comes on top.

        Args:
            packing: which positions cross.
            rows: the tokens of each row up to the last that crosses.
            targets_T: the token that each vector that crosses should predict, or ``IGNORED``.
            subjects: the records of the rows.
            share: of a step's supervised tokens that are this batch's.
        """
        boundary, z_TW = self._boundary, packing.pack(h_BLD)
        if self._bottleneck is not None:
            z_TW = self._bottleneck.narrow(z_TW)
        seen_TW = boundary.simulated(z_TW, "forward", subjects)
        questions = self._questions(rows, packing.lengths, targets_T)
        self._teach(seen_TW, questions)
        leaf_TW = z_TW.detach().float().requires_grad_()
        clipped_TW = boundary.clipped(leaf_TW, "forward", subjects)
        terms = self._terms(leaf_TW, clipped_TW, (seen_TW - clipped_TW).detach(), questions)
        # The readers change in place with every part of a step, so their share of the gradient is taken at once.
        (slope_TW,) = torch.autograd.grad(terms, leaf_TW)
        guarded: torch.Tensor = _Attached.apply(h_BLD, share * (z_TW * slope_TW).sum())  # type: ignore[no-untyped-call]
        return guarded

    def state_dict(self) -> dict[str, Any]:
        """Of the readers, their optimizer and the draw of questions; empty before the first step."""
        if self._optimizer is None:
            return {}
        states = {"readers": self._readers.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {**states, "draw": list(self._draw.getstate()[1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As they were; afresh, if the state is empty."""
        self._readers, self._optimizer = nn.ModuleDict(), None
        self._draw = random.Random(f"{self._seed}/guard")
        if state:
            self._prepare(state["readers"][f"{OWN}._into.weight"].shape[1]).load_state_dict(state["optimizer"])
            self._readers.load_state_dict(state["readers"])
            self._draw.setstate((3, tuple(state["draw"]), None))

    def _questions(self, rows: list[list[int]], lengths: list[int], targets_T: torch.Tensor) -> dict[str, Question]:
        """What readers are asked in this step; the answer only where one is supervised."""
        vocabulary, own, some = len(self._table_VE), [], []
        for row, length in zip(rows, lengths, strict=True):
            for place in range(len(row) - length, len(row)):
                own.append(row[place])
                some.append(row[self._draw.randrange(place + 1)])
        everywhere = list(range(len(own)))
        supervised = (targets_T != IGNORED).nonzero().flatten().tolist()
        asked = {OWN: (everywhere, own), ANY: (everywhere, some)}
        if supervised:
            asked[ANSWER] = (supervised, targets_T[supervised].tolist())
        return {name: Question.of(*one, vocabulary, self._draw, self._table_VE.device) for name, one in asked.items()}

    def _prepare(self, width: int) -> torch.optim.Optimizer:
        """The readers' optimizer; both are made when the width is first known."""
        if self._optimizer is None:
            state = torch.get_rng_state()
            torch.manual_seed(self._seed)
            readers = {name: Reader(width, self._table_VE) for name in (OWN, ANY, ANSWER)}
            self._readers = nn.ModuleDict(readers).to(self._table_VE.device)
            torch.set_rng_state(state)
            self._optimizer = torch.optim.Adam(self._readers.parameters(), LEARNING_RATE)
        return self._optimizer

    def _teach(self, seen_TW: torch.Tensor, questions: dict[str, Question]) -> None:
        """A few steps of the readers on what would be seen."""
        optimizer, readers = self._prepare(seen_TW.shape[1]), self._readers
        asked: list[tuple[Any, Question]] = [(readers[name], question) for name, question in questions.items()]
        for reader, question in asked:
            reader.hear(question)
        for _ in range(LESSONS):
            optimizer.zero_grad()
            for reader, question in asked:
                reader.loss(seen_TW, question).backward()
            optimizer.step()

    def _terms(
        self, z_TW: torch.Tensor, clipped_TW: torch.Tensor, noise_TW: torch.Tensor, questions: dict[str, Question]
    ) -> torch.Tensor:
        """The weighted sum of what is to be learned; notes each term.

        Capacity is that of the power before clipping: what is longer than the bound has no slope behind it.
        """
        seen_TW, weights = clipped_TW + noise_TW, self._section
        readers: Any = self._readers.requires_grad_(False)  # their own lessons are over
        zero = seen_TW.new_zeros(())
        terms = {"answer": readers[ANSWER].loss(seen_TW, questions[ANSWER]) if ANSWER in questions else zero}
        terms["inverter"] = sum(
            (readers[name].blind(questions[name]) - readers[name].loss(seen_TW, questions[name])).clamp_min(0.0)
            for name in (OWN, ANY)
        )
        if weights.capacity:
            terms["capacity"] = capacity(z_TW, noise_TW.square().mean().sqrt())
        if weights.correlation and len(z_TW) > 1:
            chosen = torch.tensor(self._draw.sample(range(len(z_TW)), min(COMPARED, len(z_TW))))
            said_TE = self._table_VE[questions[OWN].tokens_N[chosen]]
            terms["correlation"] = distance_correlation(said_TE, seen_TW[chosen])
        readers.requires_grad_(True)
        self.told = Told(**{name: float(term.detach()) for name, term in terms.items()})
        return sum((getattr(weights, name) * term for name, term in terms.items()), 0.0 * z_TW.sum())


class _Attached(torch.autograd.Function):
    """The first argument; in backward the second gets the gradient of a loss that is added."""

    @staticmethod
    def forward(ctx: Any, h_BLD: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return h_BLD.view_as(h_BLD)

    @staticmethod
    def backward(ctx: Any, gradient_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient_BLD, gradient_BLD.new_ones(())
