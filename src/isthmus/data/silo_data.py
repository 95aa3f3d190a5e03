"""All rows of one silo in tokens."""

from __future__ import annotations

from itertools import islice

from transformers import PreTrainedTokenizerBase

from isthmus.data.bad_rows import BadRows
from isthmus.data.examples import Placed, silo_examples
from isthmus.data.tokens import Tokens, batches, epochs, tokenize
from isthmus.errors import DataError
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe, RoundSteps, SiloSection


class SiloData:
    """One silo's training and held-out rows in tokens.

    Attributes:
        name: the silo's.
        train, held_out: its rows; ``held_out`` is empty without such a file.
        choices: the tokens of each possible answer; empty if answers are free text.
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
        longest, free_text = recipe.train.max_tokens, not recipe.task.choices
        fields = recipe.sensitivity.fields if recipe.sensitivity and sensitivity else {}

        self.name = section.name
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        self.choices = [
            tuple(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in recipe.task.choices
        ]

        bad = BadRows()
        train = silo_examples(section, section.train, recipe.task, bad, fields)
        held_out = silo_examples(section, section.held_out, recipe.task, bad, fields) if section.held_out else []
        bad.raise_any()

        def tokens(examples: list[Placed]) -> list[Tokens]:
            return tokenize(
                [example for _, example in examples],
                tokenizer,
                longest,
                free_text=free_text,
                choices=recipe.task.choices,
                pad=self.pad,
                sensitivity=sensitivity,
            )

        self.train, self.held_out = tokens(train), tokens(held_out)
        self._recipe = recipe
        most = recipe.most_rows(self.name)
        if recipe.train.epochs is not None and len(self.train) > most:
            raise DataError(
                f"{self.name} has {len(self.train):,} training rows; by the recipe it may have {most:,}",
                remedy=f"raise train.most_rows, or silo.most_rows of {self.name}, for all parties",
            )

    def round_steps(self, round: int) -> RoundSteps:
        """The silo's optimizer steps in a round.

        Raises:
            DataError: ``train.epochs`` leaves a round without a step.
        """
        steps, train = self._recipe.round_steps(self.name, round, len(self.train)), self._recipe.train
        if steps.total < train.rounds:
            raise DataError(
                f"{len(self.train)} rows make {steps.total} steps in train.epochs = {train.epochs}, fewer than the "
                f"{train.rounds} rounds",
                remedy=f"lower train.rounds or train.batch, or raise train.epochs, for {self.name}",
            )
        return steps

    def round_batches(self, round: int) -> list[list[Tokens]]:
        """The rows of each of the silo's optimizer steps in a round, in an order that follows from the seed."""
        recipe, steps = self._recipe, self.round_steps(round)
        seed, size = f"{recipe.seed}/{self.name}", recipe.train.batch
        if recipe.train.epochs is None:
            return list(islice(batches(self.train, size, f"{seed}/{round}"), steps.count))
        return list(islice(epochs(self.train, size, seed), steps.before, steps.before + steps.count))

    def known_rows(self) -> list[Tokens]:
        """All rows. Of classified rows whose answers are choices, one with each choice: they have the same classes."""
        return [known for row in (*self.train, *self.held_out) for known in self._with_each_choice(row)]

    def _with_each_choice(self, row: Tokens) -> list[Tokens]:
        if row.classes is None or not self.choices:
            return [row]
        prompt, longest = row.classes[: len(row.prompt)], max(map(len, self.choices))
        return [
            Tokens(
                row.prompt,
                list(choice),
                prompt + row.classes[-1:] * len(choice),
                (self.pad,) * (longest - len(choice)),
            )
            for choice in self.choices
        ]

    def evaluation_inputs(self, row: Tokens) -> list[Tokens]:
        """The rows that the model reads to score one row: the prompt alone where every choice is one token, the prompt
        with each choice where they are longer, the row itself for free text."""
        if not self.choices:
            return [row]
        if all(len(choice) == 1 for choice in self.choices):
            return [Tokens(row.prompt, [])]
        return [Tokens(row.prompt, list(choice)) for choice in self.choices]
