"""All rows of one silo in tokens."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from isthmus.data.bad_rows import BadRows
from isthmus.data.examples import silo_examples
from isthmus.data.partitions import SiloPart
from isthmus.data.row_count import refuse_idle_rounds, refuse_more_rows
from isthmus.data.row_set import RowSet, as_tokens
from isthmus.data.tokens import Tokens, batches, choice_tokens, epochs
from isthmus.errors import DataError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe, RoundSteps, SiloSection

log = logging.getLogger(__name__)


class SiloData:
    """One silo's training and held-out rows in tokens.

    Attributes:
        name: the silo's.
        train, held_out: its rows; ``held_out`` is empty without such a file.
        sets: the same two with the rows' texts and lengths, and how many were shortened or skipped.
        choices: the tokens of each possible answer; empty if answers are free text, or rows have their own choices.
        pad: token id for padding.

    Args:
        section: the silo's table of the recipe, with its files.
        sensitivity: classifies each token; None: ``Tokens.classes`` stays None.

    Raises:
        DataError: a row or file is unusable, or the silo's own sensitivity function failed.
    """

    def __init__(
        self,
        section: SiloSection,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        sensitivity: Sensitivity | None = None,
    ) -> None:
        self.name = section.name
        self.pad = padding(tokenizer)
        self.choices = [tuple(ids) for ids in choice_tokens(tokenizer, recipe.task.continuations)]

        bad = BadRows()
        self.sets = read_sets(section, recipe, tokenizer, bad, sensitivity)
        bad.raise_any()
        self.train, self.held_out = (one.rows for one in self.sets)
        self._say_long(recipe)
        self._recipe = recipe
        refuse_more_rows(recipe, self.name, len(self.train))

    def _say_long(self, recipe: Recipe) -> None:
        """Log once what became of rows that are too long.

        Raises:
            DataError: of training or held-out rows none is left.
        """
        for kind, one in zip(("training", "held-out"), self.sets, strict=True):
            if one.note:
                log.warning("%s: %s (train.max_tokens = %d): %s", self.name, kind, recipe.train.max_tokens, one.note)
            if one.lengths and not one.rows:
                raise DataError(
                    f"every {kind} row of {self.name} is longer than train.max_tokens = {recipe.train.max_tokens}",
                    remedy='raise train.max_tokens, or set train.long_rows = "truncate"',
                )

    def round_steps(self, round: int) -> RoundSteps:
        """The silo's optimizer steps in a round.

        Raises:
            DataError: ``train.epochs`` leaves a round without a step.
        """
        refuse_idle_rounds(self._recipe, self.name, len(self.train))
        return self._recipe.round_steps(self.name, round, len(self.train))

    def round_batches(self, round: int) -> list[list[Tokens]]:
        """The rows of each of the silo's optimizer steps in a round, in an order that follows from the seed and goes on
        from round to round: each row is drawn once before any comes again."""
        recipe, steps = self._recipe, self.round_steps(round)
        order = batches if recipe.train.epochs is None else epochs
        drawn = order(self.train, recipe.train.batch, f"{recipe.seed}/{self.name}")
        return list(islice(drawn, steps.before, steps.before + steps.count))

    def measured_rows(self) -> list[Tokens]:
        """The held-out rows that evaluations read: all, or ``train.evaluate_rows`` of them, drawn by the seed."""
        most = self._recipe.train.evaluate_rows
        if most is None or most >= len(self.held_out):
            return self.held_out
        return random.Random(f"{self._recipe.seed}/{self.name}/held_out").sample(self.held_out, most)

    def choices_of(self, row: Tokens) -> Sequence[tuple[int, ...]]:
        """The tokens of each possible answer to a row; empty if it is answered in free text."""
        return row.choices or self.choices

    def known_rows(self) -> list[Tokens]:
        """All rows. Of classified rows whose answers are choices, one with each choice: they have the same classes."""
        return [known for row in (*self.train, *self.held_out) for known in self._with_each_choice(row)]

    def _with_each_choice(self, row: Tokens) -> list[Tokens]:
        choices = self.choices_of(row)
        if row.classes is None or not choices:
            return [row]
        prompt, longest = row.classes[: len(row.prompt)], max(map(len, choices))
        return [
            Tokens(
                row.prompt,
                list(choice),
                prompt + row.classes[-1:] * len(choice),
                (self.pad,) * (longest - len(choice)),
                row.conversation,
            )
            for choice in choices
        ]

    def evaluation_inputs(self, row: Tokens) -> list[Tokens]:
        """The rows that the model reads to score one row: the prompt alone where every choice is one token, the prompt
        with each choice where they are longer, the row itself for free text."""
        choices = self.choices_of(row)
        if not choices:
            return [row]
        if all(len(choice) == 1 for choice in choices):
            return [Tokens(row.prompt, [])]
        return [Tokens(row.prompt, list(choice)) for choice in choices]


def read_sets(
    section: SiloSection,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    sensitivity: Sensitivity | None = None,
    parts: Mapping[str, SiloPart] | None = None,
) -> tuple[RowSet, RowSet]:
    """A silo's training and held-out rows in tokens.

    Args:
        bad: gets the errors of rows and files that cannot be used; the others are returned.
        sensitivity: classifies each token; None: ``Tokens.classes`` stays None.
        parts: of all silos (see ``divided``); None: they are read.
    """
    fields = recipe.sensitivity.fields if recipe.sensitivity and sensitivity else {}
    texts = silo_examples(section, recipe, bad, fields, parts)
    train, held_out = (as_tokens(one, recipe, tokenizer, bad, padding(tokenizer), sensitivity) for one in texts)
    return train, held_out


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id for padding."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
