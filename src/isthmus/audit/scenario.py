"""The rows of an attack: the victim's, which are attacked, and the adversary's own, from which it learns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from isthmus.attacks.catalogue import ACTIVE, DEFAULT_ATTACKS, INVERSIONS
from isthmus.attacks.score import Figure, share
from isthmus.attacks.template import template_of
from isthmus.attacks.view.view import (
    KnownPair,
    TokenRow,
    View,
    aggregator_view,
    colluding_view,
    outsider_view,
    steering_view,
    trunk_view,
)
from isthmus.audit.active import capture_hijacked, steering_of
from isthmus.audit.capture import (
    Captured,
    capture_answers,
    capture_pairs,
    capture_round,
    capture_rows,
    measure_accuracy,
)
from isthmus.audit.public_text import SAMPLED_ROWS, read_lines, sample_public_text
from isthmus.audit.target import Target
from isthmus.data.encoding import TextEncoder
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Tokens
from isthmus.errors import AttackError
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer

NOISE_DRAWS = 3
"""Crossings per own row, each with fresh noise, for ``NOISE_LEARNERS`` where ``boundary.tail`` is set."""
NOISE_LEARNERS = ("decoder",)
"""Attacks that gain from several noise draws per row."""


@dataclass(frozen=True)
class AttackPlan:
    """The attacks to run, their adversaries and their rows."""

    adversaries: tuple[str, ...] = ("trunk+silo",)
    """Names from ``attacks.view.view.ADVERSARIES``."""
    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    """Names from ``attacks.catalogue.ATTACKS``."""
    victim: str | None = None
    """The silo that is attacked; None: the recipe's first."""
    colluder: str | None = None
    """The silo that helps the adversary; None: the recipe's first that is not the victim."""
    rows: int = 40
    """Number of the victim's rows that are attacked."""
    own_rows: int = 1000
    """Most rows that the adversary learns from."""
    public: Path | None = None
    """File of public text for the adversary, one row per line; None: text is sampled from the public model."""
    inference: bool = False
    """Attack the victim's prompts and answers in inference instead of its training rows."""
    references: int = 2
    """Number of reference models for membership inference."""
    candidates: int = 1000
    """Most rows among which ``identify`` chooses, the attacked ones included."""
    device: str = "cpu"
    """The device of the attacks (see ``model.device``)."""


class Scenario:
    """The data of one attack plan on one target: each adversary's view, and the truth for scoring.

    Args:
        notify: called with messages about the progress.

    Raises:
        RecipeError: the recipe has no such victim.
        DataError: the victim's files are unusable.
    """

    def __init__(self, target: Target, plan: AttackPlan, notify: Callable[[str], None]) -> None:
        self._target, self._plan, self._notify = target, plan, notify
        recipe = target.recipe
        self.victim = recipe.party(plan.victim or recipe.silo[0].name).name
        self._folder = Checkpoint(recipe.model.path).folder
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._folder)
        self._read: dict[str, SiloData] = {}
        self._rows = self._drawn(self.victim, plan.rows)
        self._captured: Captured | None = None

    @property
    def captured(self) -> Captured:
        """The crossings of ``rows``, and their tokens."""
        if self._captured is None:
            self._notify(f"capturing {len(self._rows)} rows of {self.victim}")
            capture = capture_answers if self._plan.inference else capture_rows
            self._captured = capture(self._target, self.victim, self._rows)
        return self._captured

    @property
    def rows(self) -> list[Tokens]:
        """The victim's rows that are attacked."""
        return self._rows

    @cached_property
    def task_accuracy(self) -> Figure:
        """The model's accuracy on the victim's held-out rows if there are any, else on the attacked rows."""
        held_out = self._data(self.victim).held_out[: self._plan.rows]
        rows = held_out or self._rows
        right = round(measure_accuracy(self._target, self.victim, rows) * len(rows))
        return share([number < right for number in range(len(rows))])

    @property
    def choices(self) -> list[tuple[int, ...]]:
        """The tokens of each possible answer; empty if answers are free text."""
        return self._data(self.victim).choices

    @cached_property
    def update_rows(self) -> list[Tokens]:
        """The victim's rows behind the update in an aggregator's view."""
        return self._trained_in(self._target.completed + 1)

    @cached_property
    def membership_rows(self) -> tuple[list[Tokens], list[Tokens]]:
        """The candidates of membership inference: the victim's training rows, and held-out rows.

        Raises:
            AttackError: the target has no finished round, or the victim has no held-out rows.
        """
        rounds = range(1, self._target.completed + 1)
        members = {id(row): row for number in rounds for row in self._trained_in(number)}
        others = self._data(self.victim).held_out
        if not members:
            raise AttackError("nothing was trained", remedy="attack a run directory with a finished round")
        if not others:
            raise AttackError(f"{self.victim} has no held-out rows", remedy="give it a held_out file in the recipe")
        draw = random.Random(f"{self._target.recipe.seed}/asked")
        chosen = (list(members.values()), others)
        first, second = (draw.sample(rows, min(self._plan.rows, len(rows))) for rows in chosen)
        return first, second

    @cached_property
    def candidates(self) -> list[Tokens]:
        """The attacked rows and other rows of the victim, in random order.

        Raises:
            AttackError: the victim has no other rows, or ``AttackPlan.candidates`` leaves no room for them.
        """
        data, chosen = self._data(self.victim), {id(row) for row in self._rows}
        others = [row for row in data.train + data.held_out if id(row) not in chosen]
        draw = random.Random(f"{self._target.recipe.seed}/candidates")
        count = min(self._plan.candidates - len(self._rows), len(others))
        if count < 1:
            raise AttackError("no candidates beside the rows attacked", remedy="attack fewer rows")
        drawn = [*self._rows, *draw.sample(others, count)]
        return draw.sample(drawn, len(drawn))

    def view(self, adversary: str) -> View:
        """The view of one adversary.

        Raises:
            AttackError: the adversary lacks what the plan's attacks need, or masks hide the updates.
        """
        target, recipe = self._target, self._known_recipe
        if adversary == "aggregator":
            if recipe.federation.secure.masks:
                raise AttackError(
                    "with masks the aggregator sees no single update, only their sum",
                    remedy="set federation.secure.masks = false to measure what the masks hide",
                )
            updates = capture_round(target, self.victim)
            return aggregator_view(recipe, self._folder, updates, target.shared())
        if adversary == "outsider":
            return self._outsider()
        alone = trunk_view(recipe, self._folder, self.captured.crossings, (), target.trunk_adapter())
        if adversary == "trunk":
            return replace(alone, pairs=self._public_pairs() if self._learns else ())
        if adversary == "root+trunk":
            steering = steering_of(target, self.victim, self._rows)
            return steering_view(alone, self._public_pairs() if self._learns else (), target.shared(), steering)
        candidates = _token_rows(self.candidates) if "identify" in self._plan.attacks else ()
        return colluding_view(
            alone,
            self._colluding_pairs(),
            target.shared(),
            self._training_pairs(),
            candidates,
            lambda lesson: capture_hijacked(target, self.victim, self._rows, lesson),
        )

    @property
    def _known_recipe(self) -> Recipe:
        """The recipe with the victim's cut, as the adversary reads it there."""
        return self._target.recipe.of_silo(self.victim, ranked=False)

    @property
    def _learns(self) -> bool:
        """Whether an attack of the plan learns the boundary from the adversary's own rows."""
        return any(name in INVERSIONS or name in ("identify", *ACTIVE) for name in self._plan.attacks)

    @property
    def _draws(self) -> int:
        """Crossings of each own row."""
        boundary = self._target.recipe.boundary
        noisy = boundary.tail is not None and bool(boundary.forward.noise)
        return NOISE_DRAWS if noisy and any(name in NOISE_LEARNERS for name in self._plan.attacks) else 1

    def _outsider(self) -> View:
        target, needed = self._target, "membership" in self._plan.attacks
        candidates = [row for rows in self.membership_rows for row in rows] if needed else []
        reference_rows = self._drawn(self._others[0], self._plan.own_rows) if needed and self._others else []
        return outsider_view(
            self._known_recipe,
            self._folder,
            target.shared(),
            target.trunk_adapter(),
            _token_rows(candidates),
            _token_rows(reference_rows),
        )

    @property
    def _others(self) -> list[str]:
        """Silos that may collude: the plan's colluder if it is given, else all but the victim."""
        colluder = self._plan.colluder
        names = [colluder] if colluder else [silo.name for silo in self._target.recipe.silo]
        return [name for name in names if name != self.victim]

    def _colluder(self) -> str:
        """The silo whose crossings teach the adversary: one with the victim's cut, since others leave another block."""
        ends = self._target.recipe.ends
        alike = [name for name in self._others if ends(name) == ends(self.victim)]
        if not alike:
            raise AttackError(
                f"no silo colludes against {self.victim}{', whose cut the others do not have' * bool(self._others)}",
                remedy="give another silo as --colluder, or use --adversary trunk",
            )
        return alike[0]

    def _training_pairs(self) -> tuple[KnownPair, ...]:
        """The colluder's training rows, if an attack of the plan learns from them and gradients cross."""
        if "labels" not in self._plan.attacks or not self._target.recipe.boundary.gradients:
            return ()
        rows = self._drawn(self._colluder(), self._plan.own_rows)
        captured = capture_rows(self._target, self._colluder(), rows)
        known = zip(rows, captured.truth, captured.crossings, strict=True)
        return tuple(KnownPair(tokens, crossing, tuple(row.answer)) for row, tokens, crossing in known)

    def _trained_in(self, round: int) -> list[Tokens]:
        """The victim's rows in the steps of one round, each once."""
        rows = {id(row): row for batch in self._data(self.victim).round_batches(round) for row in batch}
        return list(rows.values())

    def _colluding_pairs(self) -> tuple[KnownPair, ...]:
        name = self._colluder()
        if not self._learns and not self._target.recipe.boundary.residual:
            return ()
        rows = self._drawn(name, self._plan.own_rows)
        if self._learns:
            rows += self._public(self._plan.own_rows - len(rows))
        return capture_pairs(self._target, name, rows, draws=self._draws)

    def _public_pairs(self) -> tuple[KnownPair, ...]:
        rows = self._public(self._plan.own_rows)
        return capture_pairs(self._target, self.victim, rows, trained=False, draws=self._draws)

    def _drawn(self, name: str, count: int) -> list[Tokens]:
        """Random training rows of a silo, ``count`` or all of them."""
        draw = random.Random(f"{self._target.recipe.seed}/{name}")
        rows = self._data(name).train
        return draw.sample(rows, min(count, len(rows)))

    def _data(self, name: str) -> SiloData:
        if name not in self._read:
            self._read[name] = SiloData(self._target.recipe.party(name), self._target.recipe, self.tokenizer)
        return self._read[name]

    def _public(self, count: int) -> list[Tokens]:
        """At most ``count`` rows of public text in the recipe's template; at most ``SAMPLED_ROWS`` if sampled."""
        if count <= 0:
            return []
        if self._plan.public is not None:
            encoder = TextEncoder(self.tokenizer)  # the template has the tokenizer's beginning
            texts = [encoder.answer(line).ids for line in read_lines(self._plan.public)]
        else:
            count = min(count, SAMPLED_ROWS)
            self._notify(f"sampling {count} rows of text from the public model")
            texts = sample_public_text(self._folder, self._target.recipe.seed, count)
        return [self._prompted(text) for text in texts if len(text) > 1][:count]

    def _prompted(self, text: list[int]) -> Tokens:
        """Public text in the recipe's template. The answer is the first choice or, with free text, the last token."""
        template, longest = template_of(self._target.recipe.task, self.tokenizer), self._target.recipe.train.max_tokens
        if self.choices:
            filled, first = max(map(len, self.choices)), list(self.choices[0])
            filler = (self._data(self.victim).pad,) * (filled - len(first))
            return Tokens(list(template.filled(text))[filled - longest :], first, filler=filler)
        tokens = list(template.filled(text))[:longest]
        return Tokens(tokens[:-1], tokens[-1:])


def _token_rows(rows: Sequence[Tokens]) -> tuple[TokenRow, ...]:
    return tuple(TokenRow(tuple(row.prompt), tuple(row.answer), row.filler) for row in rows)
