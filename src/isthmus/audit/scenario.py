"""The bench of an attack: the victim's rows as they crossed, and what each adversary has beside them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from isthmus.attacks.catalogue import INVERSIONS, USUAL
from isthmus.attacks.score import Figure, share
from isthmus.attacks.template import template_of
from isthmus.attacks.view.view import Pair, Row, View, aggregator_view, colluding_view, outsider_view, trunk_view
from isthmus.audit.capture import (
    Captured,
    Source,
    capture_answers,
    capture_pairs,
    capture_round,
    capture_rows,
    measure,
)
from isthmus.audit.public_text import SAMPLED, lines_of, sampled
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Tokens, batches
from isthmus.errors import AttackError
from isthmus.model.checkpoint import Checkpoint
from isthmus.silo.join import load_tokenizer

REDRAWN = 3
"""Draws of noise of each row that a learned attack sees, where only ends of rows cross."""
LEARNED = ("decoder",)
"""Attacks that learn more from several."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What to attack, by whom and how."""

    adversaries: tuple[str, ...] = ("trunk+silo",)
    attacks: tuple[str, ...] = USUAL
    victim: str | None = None
    """The recipe's first silo by default."""
    colluder: str | None = None
    """The first other one by default."""
    rows: int = 40
    """Of the victim."""
    own_rows: int = 1000
    """Of the adversary, at most."""
    public: Path | None = None
    """Text of the adversary's own, a row a line; by default it is drawn from the public model where it is needed."""
    inference: bool = False
    """Attack the victim's prompts and answers in inference in place of its training rows."""
    references: int = 2
    """Models that the outsider trains on the colluder's rows, to compare the final one with."""
    candidates: int = 1000
    """Rows of the victim's that ``identify`` chooses among, at most; those attacked are among them."""
    device: str = "cpu"
    """Where attacks compute (see ``model.device``)."""


class Scenario:
    """The victim's rows as they crossed, and what each adversary has beside them."""

    def __init__(self, source: Source, order: Order, tell: Tell) -> None:
        self._source, self._order, self._tell = source, order, tell
        recipe = source.recipe
        self.victim = recipe.party(order.victim or recipe.silo[0].name).name
        self._folder = Checkpoint(recipe.model.path).folder
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._folder)
        self._read: dict[str, SiloData] = {}
        self._rows = self._drawn(self.victim, order.rows)
        self._captured: Captured | None = None

    @property
    def captured(self) -> Captured:
        if self._captured is None:
            self._tell(f"capturing {len(self._rows)} rows of {self.victim}")
            capture = capture_answers if self._order.inference else capture_rows
            self._captured = capture(self._source, self.victim, self._rows)
        return self._captured

    @property
    def rows(self) -> list[Tokens]:
        """The victim's rows that ``captured`` is of."""
        return self._rows

    @cached_property
    def measured(self) -> Figure:
        """The task's accuracy, on the victim's held-out rows if it has some, else on those that are attacked."""
        held_out = self._data(self.victim).held_out[: self._order.rows]
        rows = held_out or self._rows
        right = round(measure(self._source, self.victim, rows) * len(rows))
        return share([number < right for number in range(len(rows))])

    @property
    def choices(self) -> list[tuple[int, ...]]:
        """The tokens of each possible answer."""
        return self._data(self.victim).choices

    @cached_property
    def trained(self) -> list[Tokens]:
        """The victim's rows behind the update that an aggregator sees."""
        return self._stepped(self._source.completed + 1)

    @cached_property
    def asked(self) -> tuple[list[Tokens], list[Tokens]]:
        """Rows of the victim that the run was trained on, and rows that it was not.

        Raises:
            AttackError: it was not trained, or has no held-out rows.
        """
        rounds = range(1, self._source.completed + 1)
        members = {id(row): row for number in rounds for row in self._stepped(number)}
        others = self._data(self.victim).held_out
        if not members:
            raise AttackError("nothing was trained", remedy="attack a run directory with a finished round")
        if not others:
            raise AttackError(f"{self.victim} has no held-out rows", remedy="name held_out rows in the recipe")
        draw = random.Random(f"{self._source.recipe.seed}/asked")
        chosen = (list(members.values()), others)
        first, second = (draw.sample(rows, min(self._order.rows, len(rows))) for rows in chosen)
        return first, second

    @cached_property
    def candidates(self) -> list[Tokens]:
        """The rows that are attacked among others of the victim's, in no order that tells which are.

        Raises:
            AttackError: those attacked are all that there are, or more than are wanted.
        """
        data, chosen = self._data(self.victim), {id(row) for row in self._rows}
        others = [row for row in data.train + data.held_out if id(row) not in chosen]
        draw = random.Random(f"{self._source.recipe.seed}/candidates")
        count = min(self._order.candidates - len(self._rows), len(others))
        if count < 1:
            raise AttackError("no candidates beside the rows attacked", remedy="attack fewer rows, or give more")
        drawn = [*self._rows, *draw.sample(others, count)]
        return draw.sample(drawn, len(drawn))

    def view(self, adversary: str) -> View:
        """What this adversary sees."""
        source, recipe = self._source, self._source.recipe
        if adversary == "aggregator":
            if recipe.federation.secure.masks:
                raise AttackError(
                    "under masks the aggregator sees no silo's update, only their sum",
                    remedy="attack with federation.secure.masks = false to see what the masks hide",
                )
            contributions = capture_round(source, self.victim)
            return aggregator_view(recipe, self._folder, contributions, source.shared())
        if adversary == "outsider":
            return self._outside()
        alone = trunk_view(recipe, self._folder, self.captured.crossings, (), source.trunk_adapter())
        if adversary == "trunk":
            return replace(alone, pairs=self._public_pairs() if self._learns else ())
        asked = _clear(self.candidates) if "identify" in self._order.attacks else ()
        return colluding_view(alone, self._colluding_pairs(), source.shared(), self._taught(), asked)

    @property
    def _learns(self) -> bool:
        """Whether an attack of the order learns from the adversary's own rows."""
        return any(name in INVERSIONS or name == "identify" for name in self._order.attacks)

    @property
    def _draws(self) -> int:
        """How often the adversary pushes each of its rows through its boundary."""
        boundary = self._source.recipe.boundary
        noisy = boundary.tail is not None and bool(boundary.forward.noise)
        return REDRAWN if noisy and any(name in LEARNED for name in self._order.attacks) else 1

    def _outside(self) -> View:
        source, asks = self._source, "membership" in self._order.attacks
        asked = [row for rows in self.asked for row in rows] if asks else []
        own = self._drawn(self._others[0], self._order.own_rows) if asks and self._others else []
        return outsider_view(
            source.recipe,
            self._folder,
            source.shared(),
            source.trunk_adapter(),
            _clear(asked),
            _clear(own),
        )

    @property
    def _others(self) -> list[str]:
        """Silos that may side with the adversary; only the one that was named, if one was."""
        named = self._order.colluder
        names = [named] if named else [silo.name for silo in self._source.recipe.silo]
        return [name for name in names if name != self.victim]

    def _colluder(self) -> str:
        if not self._others:
            raise AttackError(
                f"no silo colludes against {self.victim}", remedy="name another by --colluder, or use --adversary trunk"
            )
        return self._others[0]

    def _taught(self) -> tuple[Pair, ...]:
        """Training steps of the colluder, if an attack of the order learns from them and gradients come up."""
        if "labels" not in self._order.attacks or not self._source.recipe.boundary.gradients:
            return ()
        rows = self._drawn(self._colluder(), self._order.own_rows)
        captured = capture_rows(self._source, self._colluder(), rows)
        told = zip(rows, captured.truth, captured.crossings, strict=True)
        return tuple(Pair(tokens, crossing, tuple(row.answer)) for row, tokens, crossing in told)

    def _stepped(self, round: int) -> list[Tokens]:
        """The victim's rows of this round's steps, each once."""
        train = self._source.recipe.train
        drawn = batches(self._data(self.victim).train, train.batch, f"{self._source.recipe.seed}/{self.victim}/{round}")
        rows = {id(row): row for batch in islice(drawn, train.steps) for row in batch}
        return list(rows.values())

    def _colluding_pairs(self) -> tuple[Pair, ...]:
        name = self._colluder()
        if not self._learns and not self._source.recipe.boundary.residual:
            return ()
        rows = self._drawn(name, self._order.own_rows)
        if self._learns:
            rows += self._public(self._order.own_rows - len(rows))
        return capture_pairs(self._source, name, rows, draws=self._draws)

    def _public_pairs(self) -> tuple[Pair, ...]:
        rows = self._public(self._order.own_rows)
        return capture_pairs(self._source, self.victim, rows, trained=False, draws=self._draws)

    def _drawn(self, name: str, count: int) -> list[Tokens]:
        """Rows of a silo."""
        draw = random.Random(f"{self._source.recipe.seed}/{name}")
        rows = self._data(name).train
        return draw.sample(rows, min(count, len(rows)))

    def _data(self, name: str) -> SiloData:
        if name not in self._read:
            self._read[name] = SiloData(self._source.recipe.party(name), self._source.recipe, self.tokenizer)
        return self._read[name]

    def _public(self, count: int) -> list[Tokens]:
        """So many rows of public text, as the recipe's prompts; fewer if they must be drawn from the public model."""
        if count <= 0:
            return []
        if self._order.public is not None:
            texts = [self.tokenizer(line)["input_ids"] for line in lines_of(self._order.public)]
        else:
            count = min(count, SAMPLED)
            self._tell(f"drawing {count} rows of text from the public model")
            texts = sampled(self._folder, self._source.recipe.seed, count)
        return [self._prompted(text) for text in texts if len(text) > 1][:count]

    def _prompted(self, text: list[int]) -> Tokens:
        """Public text in the recipe's template; an answer that is no choice is its last token."""
        template, longest = template_of(self._source.recipe.task, self.tokenizer), self._source.recipe.train.max_tokens
        if self.choices:
            room = longest - len(self.choices[0])
            return Tokens(list(template.filled(text))[-room:], list(self.choices[0]))
        tokens = list(template.filled(text))[:longest]
        return Tokens(tokens[:-1], tokens[-1:])


def _clear(rows: Sequence[Tokens]) -> tuple[Row, ...]:
    return tuple(Row(tuple(row.prompt), tuple(row.answer)) for row in rows)
