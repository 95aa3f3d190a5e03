"""Attacking a run or a recipe: what an adversary recovers of a silo's text from what it sees."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from isthmus.attacks.catalogue import INVERSIONS, USUAL
from isthmus.attacks.knowledge import Knowledge, public_model
from isthmus.attacks.score import Figure, score
from isthmus.attacks.view import (
    ADVERSARIES,
    Pair,
    View,
    aggregator_view,
    colluding_view,
    outsider_view,
    trunk_view,
)
from isthmus.engines.capture import Captured, Source, capture_answers, capture_pairs, capture_round, capture_rows
from isthmus.engines.threads import set_threads
from isthmus.errors import AttackError, RunError
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.report.record import RunDirectory, writing
from isthmus.silo.data import Tokens
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import SiloData

NAME = "attack.json"
SAMPLED = 256
"""Rows that are drawn from the public model for an adversary without text of its own."""
SAMPLED_TOKENS = 48
Tell = Callable[[str], None]
Sensitive = Callable[[Sequence[int]], list[bool]]


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


@dataclass(frozen=True)
class Result:
    """What one attack by one adversary recovered."""

    adversary: str
    attack: str
    victim: str
    rows: int
    own_rows: int
    seconds: float
    tokens: str
    """``all``, ``text`` (not what all rows have in common at their ends: the template) or ``sensitive``."""
    figures: dict[str, Figure]


def opened(path: Path) -> Source:
    """The recipe or run directory at this path.

    Raises:
        RunError, RecipeError: it is neither.
    """
    if path.is_dir():
        run = RunDirectory.open(path)
        return Source(run.recipe(), run)
    return Source(Recipe.read(path))


def attack(source: Source, order: Order, tell: Tell, sensitive: Sensitive | None = None) -> list[Result]:
    """Make every attack of the order by every adversary of it.

    Args:
        tell: gets a sentence now and then.
        sensitive: which tokens of a row are; scored apart then.

    Raises:
        AttackError: an attack that is unknown or that an adversary cannot make, or the rows do not suffice.
    """
    _check(order)
    set_threads(source.recipe)
    transformers_logging.disable_progress_bar()
    bench = _Bench(source, order, tell)
    results: list[Result] = []
    for adversary in order.adversaries:
        knowledge = Knowledge(bench.view(adversary))
        for name in order.attacks:
            tell(f"{adversary}: {name}")
            started = time.perf_counter()
            guess = INVERSIONS[name](knowledge)
            told = (adversary, name, bench.victim, len(bench.captured.truth), len(knowledge.view.pairs))
            results += bench.results(told, guess, time.perf_counter() - started, sensitive)
    return results


def note(run: RunDirectory, results: Sequence[Result]) -> Path:
    """Write the results into the run directory, in place of earlier ones of the same attacks."""
    path = run.path / NAME
    made = {(one.adversary, one.attack, one.victim) for one in results}
    earlier = [one for one in _noted(path) if (one["adversary"], one["attack"], one["victim"]) not in made]
    with writing(path) as temporary:
        temporary.write_text(json.dumps([*earlier, *map(asdict, results)], indent=1) + "\n", encoding="utf-8")
    return path


def table(results: Sequence[Result]) -> Table:
    """The results for a terminal, in per cent with their intervals."""
    shown = Table("adversary", "attack", "tokens", "token accuracy", "exact rows", "ROUGE-1", "ROUGE-L", "BLEU-4", "s")
    for one in results:
        names = ("token_accuracy", "exact_match", "rouge1", "rougeL", "bleu4")
        cells = [_percent(one.figures[name]) for name in names]
        shown.add_row(one.adversary, one.attack, one.tokens, *cells, f"{one.seconds:.0f}")
    return shown


class _Bench:
    """The victim's rows as they crossed, and what each adversary has beside them."""

    def __init__(self, source: Source, order: Order, tell: Tell) -> None:
        self._source, self._order, self._tell = source, order, tell
        recipe = source.recipe
        self.victim = recipe.party(order.victim or recipe.silo[0].name).name
        self._folder = Checkpoint(recipe.model.path).folder
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._folder)
        self._rows = self._drawn(self.victim, order.rows)
        self._captured: Captured | None = None

    @property
    def captured(self) -> Captured:
        if self._captured is None:
            self._tell(f"capturing {len(self._rows)} rows of {self.victim}")
            capture = capture_answers if self._order.inference else capture_rows
            self._captured = capture(self._source, self.victim, self._rows)
        return self._captured

    def view(self, adversary: str) -> View:
        """What this adversary sees."""
        source, recipe = self._source, self._source.recipe
        if adversary == "aggregator":
            contributions = capture_round(source, self.victim)
            return aggregator_view(recipe, self._folder, contributions, source.shared())
        if adversary == "outsider":
            return outsider_view(recipe, self._folder, source.shared(), source.trunk_adapter())
        pairs = () if adversary == "trunk+silo" else self._public_pairs()
        alone = trunk_view(recipe, self._folder, self.captured.crossings, pairs, source.trunk_adapter())
        return alone if adversary == "trunk" else colluding_view(alone, self._colluding_pairs(), source.shared())

    def results(
        self, told: tuple[str, str, str, int, int], guess: list[list[int]], seconds: float, sensitive: Sensitive | None
    ) -> list[Result]:
        """The guess scored on all tokens, on those of the text, and on sensitive ones."""
        truth = self.captured.truth
        masks = {"all": None, "text": None if self._order.inference else _text(self._rows)}
        if sensitive is not None:
            masks["sensitive"] = [sensitive(row) for row in truth]
        decode = self._tokenizer.decode
        return [
            Result(*told, round(seconds, 1), tokens, score(truth, guess, decode, only=mask))
            for tokens, mask in masks.items()
        ]

    def _colluding_pairs(self) -> tuple[Pair, ...]:
        others = [silo.name for silo in self._source.recipe.silo if silo.name != self.victim]
        name = self._order.colluder or (others[0] if others else None)
        if name is None or name == self.victim:
            raise AttackError(
                f"no silo colludes against {self.victim}", remedy="name another by --colluder, or use --adversary trunk"
            )
        rows = self._drawn(name, self._order.own_rows)
        rows += self._public(min(self._order.own_rows - len(rows), SAMPLED))
        return capture_pairs(self._source, name, rows)

    def _public_pairs(self) -> tuple[Pair, ...]:
        rows = self._public(self._order.own_rows if self._order.public else min(self._order.own_rows, SAMPLED))
        return capture_pairs(self._source, self.victim, rows, trained=False)

    def _drawn(self, name: str, count: int) -> list[Tokens]:
        """Rows of a silo."""
        data = SiloData(self._source.recipe.party(name), self._source.recipe, self._tokenizer)
        draw = random.Random(f"{self._source.recipe.seed}/{name}")
        return draw.sample(data.train, min(count, len(data.train)))

    def _public(self, count: int) -> list[Tokens]:
        """So many rows of public text."""
        if count <= 0:
            return []
        if self._order.public is not None:
            longest = self._source.recipe.train.max_tokens
            texts = [self._tokenizer(line)["input_ids"][:longest] for line in _lines(self._order.public)]
        else:
            self._tell(f"drawing {count} rows of text from the public model")
            texts = sampled(self._folder, self._source.recipe.seed, count)
        return [Tokens(text[:-1], text[-1:]) for text in texts if len(text) > 1][:count]


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


def _text(rows: Sequence[Tokens]) -> list[list[bool]] | None:
    """Which tokens are no template: not at an end of the prompt that all rows share. None if no such end is there."""
    prompts = [row.prompt for row in rows]
    before, after = _shared(prompts), _shared([prompt[::-1] for prompt in prompts])
    if len(set(map(tuple, prompts))) == 1 or not before + after:
        return None
    return [
        [before <= place < len(row.prompt) - after or place >= len(row.prompt) for place in range(len(row.input))]
        for row in rows
    ]


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with."""
    columns = zip(*rows, strict=False)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))


def _check(order: Order) -> None:
    for given, known in ((order.attacks, tuple(INVERSIONS)), (order.adversaries, ADVERSARIES)):
        if unknown := [one for one in given if one not in known]:
            raise AttackError(f"there is no {unknown[0]!r}", remedy=f"use one of: {', '.join(known)}")
    if order.rows < 1 or order.own_rows < 2:
        raise AttackError(f"{order.rows} rows, {order.own_rows} own rows", remedy="ask for 1 and 2 rows at least")


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AttackError(f"cannot read {path}", remedy="give --public a UTF-8 file, a row a line") from error
    if not lines:
        raise AttackError(f"{path} holds no text", remedy="give --public a UTF-8 file, a row a line")
    return lines


def _noted(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        noted: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [one for one in noted if {"adversary", "attack", "victim"} <= one.keys()]
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is no record of attacks", remedy="move the file away") from error


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
