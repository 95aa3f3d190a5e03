"""Feature-space hijacking: a trunk that returns gradients of its own (Pasquini, Ateniese and Bernaschi 2021).

Adversary: the trunk with a colluding silo. In place of the loss's gradients it returns such as train the victim's
bottom to tell an attribute of the text. It does not know which of the victim's rows have the attribute. But from the
colluding silo it knows the adapters that each round begins with; so it runs the same bottom on text of its own and fits
a critic: how likely the row of a vector has the attribute. It returns the gradient that makes the critic surer of what
it holds more likely. So what the critic is right about by a little becomes right by more, round by round. In the end it
reads the victim's vectors. The paper's trunk knows nothing of the victim's network, and has an encoder of its own and a
critic of vectors; here bottom is public, and knowing its adapters replaces the encoder.

Shapes: B sequences of a step, L vectors of one sequence, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import AttributeGuesses
from isthmus.attacks.steering import Attribute, Row, crossing_vectors, halving_attribute, noise_of
from isthmus.attacks.view.view import Crossing, Tensors
from isthmus.model import adapters
from isthmus.model.optim import build_optimizer

CRITIC_WIDTH, CRITIC_RATE, CRITIC_ROWS = 64, 3e-3, 128
"""Width of the critic's hidden layer, its learning rate, and the rows in each of its steps."""
CRITIC_START, CRITIC_STEPS = 100, 4
"""Batches that the critic learns from before the first lesson and after the last; its steps on each."""


class Hijacker:
    """The trunk's own bottom, which learns beside the victim's, and the critic of both.

    Args:
        rows: text of its own.
    """

    def __init__(self, knowledge: Knowledge, rows: Sequence[Row], attribute: Attribute) -> None:
        recipe = knowledge.view.recipe
        self._knowledge, self._rows, self._noise = knowledge, rows, noise_of(knowledge)
        self._draw = torch.Generator().manual_seed(recipe.seed)
        self._has_N = torch.tensor([float(attribute.of(row)) for row in rows])
        self._bottom = knowledge.equipped("bottom")
        self._known: Tensors | None = None
        moving = list(adapters.trainable(self._bottom).values())
        self._step = build_optimizer(moving, recipe.train) if moving else None
        with torch.no_grad():
            z_BD, _ = self._own()
        self._mean_D, self._scale = z_BD.mean(dim=0), float(z_BD.std().clamp_min(1e-12))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self._critic = nn.Sequential(nn.Linear(z_BD.shape[1], CRITIC_WIDTH), nn.Tanh(), nn.Linear(CRITIC_WIDTH, 1))
        self._learn = torch.optim.Adam(self._critic.parameters(), lr=CRITIC_RATE)
        self.lessons = 0
        """How many it has given."""
        self._begin()

    @torch.enable_grad()
    def teach(self, sequences: Sequence[torch.Tensor], known: Tensors) -> list[torch.Tensor]:
        """The gradients, ``[L, D]`` each, of the victim's vectors; of all but each sequence's last one zero.

        Args:
            known: the adapters that the round began with.
        """
        self.lessons += 1
        self._follow(known)
        z_BD, has_B = self._own()
        for _ in range(CRITIC_STEPS):
            self._fit(z_BD.detach(), has_B)
        if self._step is not None:  # within a round it follows the victim by the same lesson
            self._step.zero_grad()
            z_BD.backward(self._lesson(self._noised(z_BD.detach())))  # type: ignore[no-untyped-call]
            self._step.step()
        returned = [torch.zeros_like(one, dtype=torch.float32) for one in sequences]
        gradient_BD = self._lesson(torch.stack([one[-1].float() for one in sequences]))
        for one, gradient_D in zip(returned, gradient_BD, strict=True):
            one[-1] = gradient_D
        return returned

    @torch.no_grad()
    def read(self, crossings: Sequence[Crossing]) -> list[bool]:
        """The attribute of each crossing's row, from its last vector alone."""
        z_BD = torch.stack([one.hidden_LD[-1].float() for one in crossings])
        found: list[bool] = (self._logits(z_BD) > 0).tolist()
        return found

    def adopt(self, known: Tensors) -> None:
        """The victim's bottom has these adapters now; a frozen one has none."""
        if self._step is None:
            return
        self._follow(known)
        self._begin()

    def _follow(self, known: Tensors) -> None:
        """Adapters of another round than those before are the own bottom's, too."""
        if self._known is None or any(not torch.equal(one, self._known[name]) for name, one in known.items()):
            self._known = known
            adapters.load_adapter(self._bottom, known)

    def _own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of its own bottom without noise, and whether their rows have the attribute."""
        chosen = torch.randint(len(self._rows), (CRITIC_ROWS,), generator=self._draw).tolist()
        z_BD = crossing_vectors(self._knowledge, self._bottom, [self._rows[number] for number in chosen])
        return z_BD, self._has_N[chosen]

    def _noised(self, z_BD: torch.Tensor) -> torch.Tensor:
        return z_BD + self._noise * torch.randn(z_BD.shape, generator=self._draw)

    def _begin(self) -> None:
        """Fit the critic to bottom as it is."""
        for _ in range(CRITIC_START):
            with torch.no_grad():
                z_BD, has_B = self._own()
            for _ in range(CRITIC_STEPS):
                self._fit(z_BD, has_B)

    def _fit(self, z_BD: torch.Tensor, has_B: torch.Tensor) -> None:
        self._learn.zero_grad()
        loss = binary_cross_entropy_with_logits(self._logits(self._noised(z_BD)), has_B)
        loss.backward()  # type: ignore[no-untyped-call]
        self._learn.step()

    def _lesson(self, z_BD: torch.Tensor) -> torch.Tensor:
        """The gradient by which the critic becomes surer of what it holds likely."""
        z_BD = z_BD.detach().requires_grad_()
        logits_B = self._logits(z_BD)
        weight_B = (2 * logits_B.detach().sigmoid() - 1).abs()
        loss = -(weight_B * nn.functional.logsigmoid(logits_B * logits_B.detach().sign())).mean()
        (gradient_BD,) = torch.autograd.grad(loss, z_BD)
        return gradient_BD

    def _logits(self, z_BD: torch.Tensor) -> torch.Tensor:
        logits_B: torch.Tensor = self._critic((z_BD - self._mean_D) / self._scale)[:, 0]
        return logits_B


def hijack(knowledge: Knowledge) -> AttributeGuesses:
    """Whether each attacked row has the attribute, read from one vector: after hijacked training, and before."""
    view = knowledge.view.needs("crossings", "pairs", "hijacking")
    assert view.hijacking is not None
    rows = [pair.tokens for pair in view.pairs]
    attribute = halving_attribute(rows)
    hijacker = Hijacker(knowledge, rows, attribute)
    before = hijacker.read(view.crossings)
    crossings, known = view.hijacking(hijacker.teach)
    hijacker.adopt(known)
    return AttributeGuesses(
        {"hijacked": hijacker.read(crossings), "unhijacked": before},
        attribute.tokens,
        (f"{hijacker.lessons} gradients returned",),
    )
