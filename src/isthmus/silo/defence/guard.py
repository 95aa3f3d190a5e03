"""The guard: a loss that trains bottom and the bottleneck to reveal the answer and little else of the text.

It is added to the task's loss. It is computed on the hidden states as the trunk will receive them, clipped and noised,
and weighs what they reveal of the answer against what they reveal of the text. Their information about the text is
bounded from below by a simulated inverter (Barber and Agakov 2003) and from above by the capacity of the noisy channel.
Nothing of this leaves the silo.

Shapes: B rows, L positions, T vectors that cross, D the model's width, W the width that crosses, V vocabulary,
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

READER_STEPS = 3
"""Optimizer steps of the readers for each step of bottom."""
LEARNING_RATE = 2e-3
"""Learning rate of the readers."""
MAX_COMPARED = 512
"""Largest number of vectors in the distance correlation."""
OWN, ANY, ANSWER = "own", "any", "answer"
"""Readers by the token that they predict: a vector's own, a random one of its text so far, the one to follow."""


@dataclass(frozen=True)
class GuardTerms:
    """The terms of the guard's loss in one step, before weighting: nats per vector, and the correlation."""

    answer: float = 0.0
    """Cross-entropy of the reader that predicts the answer from the vector alone."""
    inverter: float = 0.0
    """Gain over token frequencies of the readers of a vector's own token and of a token of its text, summed."""
    capacity: float = 0.0
    """Capacity of the noisy channel."""
    correlation: float = 0.0
    """Distance correlation of vectors and token embeddings, 0 to 1."""


class Guard:
    """Implements ``model.split.BottomGuard`` with the recipe's weights.

    Args:
        section: weights of the terms.
        boundary: clips and noises as in a release.
        bottleneck: projects bottom's output; None: there is none.
        table_VE: the model's token embedding.
        seed: seed of the readers' initial weights and of random tokens.
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
        self.last_terms = GuardTerms()
        """The terms of the last step; zeros before the first."""

    def __call__(
        self,
        h_BLD: torch.Tensor,
        packing: Packing,
        rows: list[list[int]],
        targets_T: torch.Tensor,
        subjects: Subjects,
        share: float = 1.0,
    ) -> torch.Tensor:
        """``h_BLD`` unchanged; in backward the gradient of the guard's loss, times ``share``, is added to its own.

        Args:
            h_BLD: bottom's output.
            packing: the positions that cross.
            rows: token ids of each row up to the last that crosses.
            targets_T: the token that each vector should predict, or ``IGNORED``.
            subjects: the records that the rows belong to.
            share: the batch's share of the step's weight, 0 to 1.
        """
        boundary, z_TW = self._boundary, packing.pack(h_BLD)
        if self._bottleneck is not None:
            z_TW = self._bottleneck.narrow(z_TW)
        seen_TW = boundary.simulated(z_TW, "forward", subjects)
        questions = self._questions(rows, packing.lengths, targets_T)
        self._train_readers(seen_TW, questions)
        leaf_TW = z_TW.detach().float().requires_grad_()
        clipped_TW = boundary.clipped(leaf_TW, "forward", subjects)
        terms = self._terms(leaf_TW, clipped_TW, (seen_TW - clipped_TW).detach(), questions)
        # The readers are updated in place in each micro-batch, so the gradient is computed now.
        (gradient_TW,) = torch.autograd.grad(terms, leaf_TW)
        guarded: torch.Tensor = _AddedLoss.apply(h_BLD, share * (z_TW * gradient_TW).sum())  # type: ignore[no-untyped-call]
        return guarded

    def state_dict(self) -> dict[str, Any]:
        """State of the readers, their optimizer and the random generator; empty before the first step."""
        if self._optimizer is None:
            return {}
        states = {"readers": self._readers.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {**states, "draw": list(self._draw.getstate()[1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from ``state_dict``; the initial state if it is empty."""
        self._readers, self._optimizer = nn.ModuleDict(), None
        self._draw = random.Random(f"{self._seed}/guard")
        if state:
            self._prepare(state["readers"][f"{OWN}._into.weight"].shape[1]).load_state_dict(state["optimizer"])
            self._readers.load_state_dict(state["readers"])
            self._draw.setstate((3, tuple(state["draw"]), None))

    def _questions(self, rows: list[list[int]], lengths: list[int], targets_T: torch.Tensor) -> dict[str, Question]:
        """Each reader's question in this step, by name. The answer's covers the supervised positions only."""
        vocabulary, own, some = len(self._table_VE), [], []
        for row, length in zip(rows, lengths, strict=True):
            for position in range(len(row) - length, len(row)):
                own.append(row[position])
                some.append(row[self._draw.randrange(position + 1)])
        everywhere = list(range(len(own)))
        supervised = (targets_T != IGNORED).nonzero().flatten().tolist()
        targets = {OWN: (everywhere, own), ANY: (everywhere, some)}
        if supervised:
            targets[ANSWER] = (supervised, targets_T[supervised].tolist())
        return {name: Question.of(*one, vocabulary, self._draw, self._table_VE.device) for name, one in targets.items()}

    def _prepare(self, width: int) -> torch.optim.Optimizer:
        """The readers' optimizer. Both are created at the first step, when the width W is known."""
        if self._optimizer is None:
            state = torch.get_rng_state()
            torch.manual_seed(self._seed)
            readers = {name: Reader(width, self._table_VE) for name in (OWN, ANY, ANSWER)}
            self._readers = nn.ModuleDict(readers).to(self._table_VE.device)
            torch.set_rng_state(state)
            self._optimizer = torch.optim.Adam(self._readers.parameters(), LEARNING_RATE)
        return self._optimizer

    def _train_readers(self, seen_TW: torch.Tensor, questions: dict[str, Question]) -> None:
        """Train the readers for ``READER_STEPS`` steps on the noised vectors."""
        optimizer, readers = self._prepare(seen_TW.shape[1]), self._readers
        pairs: list[tuple[Any, Question]] = [(readers[name], question) for name, question in questions.items()]
        for reader, question in pairs:
            reader.count(question)
        for _ in range(READER_STEPS):
            optimizer.zero_grad()
            for reader, question in pairs:
                reader.loss(seen_TW, question).backward()
            optimizer.step()

    def _terms(
        self, z_TW: torch.Tensor, clipped_TW: torch.Tensor, noise_TW: torch.Tensor, questions: dict[str, Question]
    ) -> torch.Tensor:
        """The weighted sum of the terms. ``last_terms`` gets each of them.

        Capacity is computed before clipping, since a clipped vector has no gradient in its length.
        """
        seen_TW, weights = clipped_TW + noise_TW, self._section
        readers: Any = self._readers.requires_grad_(False)  # no gradient for the readers
        zero = seen_TW.new_zeros(())
        terms = {"answer": readers[ANSWER].loss(seen_TW, questions[ANSWER]) if ANSWER in questions else zero}
        terms["inverter"] = sum(
            (readers[name].frequency_loss(questions[name]) - readers[name].loss(seen_TW, questions[name])).clamp_min(
                0.0
            )
            for name in (OWN, ANY)
        )
        if weights.capacity:
            terms["capacity"] = capacity(z_TW, noise_TW.square().mean().sqrt())
        if weights.correlation and len(z_TW) > 1:
            chosen = torch.tensor(self._draw.sample(range(len(z_TW)), min(MAX_COMPARED, len(z_TW))))
            embedded_TE = self._table_VE[questions[OWN].tokens_N[chosen]]
            terms["correlation"] = distance_correlation(embedded_TE, seen_TW[chosen])
        readers.requires_grad_(True)
        self.last_terms = GuardTerms(**{name: float(term.detach()) for name, term in terms.items()})
        return sum((getattr(weights, name) * term for name, term in terms.items()), 0.0 * z_TW.sum())


class _AddedLoss(torch.autograd.Function):
    """Returns its first argument. In backward the second gets gradient 1, as if it were added to the loss."""

    @staticmethod
    def forward(ctx: Any, h_BLD: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        return h_BLD.view_as(h_BLD)

    @staticmethod
    def backward(ctx: Any, gradient_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient_BLD, gradient_BLD.new_ones(())
