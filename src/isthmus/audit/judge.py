"""What attacks found, scored against the truth, which no adversary sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rouge_score.rouge_scorer import RougeScorer

from isthmus.attacks.found import Found, Labels, Ranks, Scores, Texts
from isthmus.attacks.found import Tokens as FoundTokens
from isthmus.attacks.gradients.labels import named
from isthmus.attacks.membership.inference import separation
from isthmus.attacks.score import Figure, score, share
from isthmus.audit.scenario import Scenario
from isthmus.data.tokens import Tokens
from isthmus.tasks.metrics import majority

Sensitive = Callable[[Sequence[int]], list[bool]]
Scored = Iterator[tuple[str, dict[str, Figure], tuple[str, ...]]]
"""What the figures are of, the figures, notes."""


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
    """What the figures are of. Of tokens: ``all``, ``text`` (not what all rows have in common at their ends: the
    template), ``sensitive``, ``response``, or an ``update``'s. Of ``candidates``: how often the right one was named.
    Of labels and membership: by which method, or that of the ``strongest``."""
    figures: dict[str, Figure]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judge:
    """Scores what was found on this scenario.

    Args:
        inference: the victim's answers were attacked, not its training.
        sensitive: which tokens of a row are; scored apart then.
    """

    scenario: Scenario
    inference: bool
    sensitive: Sensitive | None = field(default=None)

    def results(self, told: tuple[str, str], found: Found, seconds: float, own_rows: int) -> list[Result]:
        """One result for each thing that figures are of.

        Args:
            told: adversary and attack.
            own_rows: from which the adversary learned.
        """
        rows, scored = self._scored(found)
        return [
            Result(*told, self.scenario.victim, rows, own_rows, round(seconds, 1), of, figures, notes)
            for of, figures, notes in scored
        ]

    def _scored(self, found: Found) -> tuple[int, Scored]:
        """Of how many rows, and the figures."""
        scenario = self.scenario
        if isinstance(found, Labels):
            return len(scenario.rows), self._labels(found)
        if isinstance(found, Texts):
            return len(scenario.trained), self._texts(found)
        if isinstance(found, Scores):
            return sum(map(len, scenario.asked)), self._membership(found)
        if isinstance(found, Ranks):
            return len(scenario.rows), self._identified(found)
        return len(scenario.rows), self._response(found) if found.response else self._tokens(found)

    def _tokens(self, found: FoundTokens) -> Scored:
        """On all tokens, on those of the text, and on sensitive ones."""
        truth = self.scenario.captured.truth
        masks = {"all": None, "text": None if self.inference else _text(self.scenario.rows)}
        if self.sensitive is not None:
            sensitive = [self.sensitive(row) for row in truth]
            masks |= {"sensitive": sensitive} if any(map(any, sensitive)) else {}
        for of, mask in masks.items():
            yield of, score(truth, found.ids, self._decode, only=mask), ()

    def _response(self, found: FoundTokens) -> Scored:
        """On the answer's tokens, without the one that closes every answer."""
        rows = self.scenario.rows
        whole = self.scenario.captured.truth if self.inference else [(*row.prompt, *row.answer) for row in rows]
        end = self.scenario.tokenizer.eos_token_id
        masks = [
            [place >= len(row.prompt) and token != end for place, token in enumerate(tokens)]
            for row, tokens in zip(rows, whole, strict=True)
        ]
        yield "response", score(whole, found.ids, self._decode, only=masks), ()

    def _labels(self, found: Labels) -> Scored:
        """Accuracy by each method, beside that of always saying the commonest label, and the task's own."""
        choices = self.scenario.choices
        right = [choices.index(tuple(row.answer)) for row in self.scenario.rows]
        commonest = max(right, key=right.count)
        assert majority(right) == right.count(commonest) / len(right)
        beside = {"majority": share([label == commonest for label in right]), "task_accuracy": self.scenario.measured}
        said = {
            method: named(labels, right) if method in found.unnamed else labels for method, labels in found.by.items()
        }
        figures = {
            method: {"accuracy": share([one == two for one, two in zip(labels, right, strict=True)]), **beside}
            for method, labels in said.items()
        }
        best = max(figures, key=lambda method: figures[method]["accuracy"].value)
        yield "strongest", figures[best], (best, *found.notes)
        for method, one in figures.items():
            yield method, one, ()

    def _texts(self, found: Texts) -> Scored:
        """Each row behind the update against that of the texts which is most like it: this favours the attack."""
        truth = [(*row.prompt, *row.answer) for row in self.scenario.trained]
        scorer = RougeScorer(["rouge1", "rougeL"])
        said = [(text, self._decode(text)) for text in found.ids] or [([], "")]

        def likeness(reference: str, text: str) -> float:
            return sum(float(one.fmeasure) for one in scorer.score(reference, text).values())

        guesses = []
        for row in truth:
            reference = self._decode(list(row))
            guesses.append(max(said, key=lambda pair: likeness(reference, pair[1]))[0])
        yield "update", score(truth, guesses, self._decode), found.notes

    def _membership(self, found: Scores) -> Scored:
        """How well each method tells rows that were trained on from others."""
        members, others = self.scenario.asked
        told = [True] * len(members) + [False] * len(others)
        figures = {}
        for method, scores in found.by.items():
            apart = separation(scores, told)
            auc, tpr = apart.auc, apart.tpr
            figures[method] = {
                "auc": Figure(auc.value, auc.low, auc.high),
                "tpr_at_1_fpr": Figure(tpr.value, tpr.low, tpr.high),
            }
        best = max(figures, key=lambda method: figures[method]["auc"].value)
        yield "strongest", figures[best], (best, *found.notes)
        for method, one in figures.items():
            yield method, one, ()

    def _identified(self, found: Ranks) -> Scored:
        """How often the right candidate was named first, or among the first ten; beside it, what a blind guess has."""
        candidates = [tuple(row.input) for row in self.scenario.candidates]
        told = zip(self.scenario.captured.truth, found.by_row, strict=True)
        ranks = [[candidates[number] == right for number in ranked] for right, ranked in told]
        blind = 1 / len(candidates)
        figures = {
            "top1": share([any(ranked[:1]) for ranked in ranks]),
            "top10": share([any(ranked[:10]) for ranked in ranks]),
            "chance": Figure(blind, blind, blind),
        }
        yield "candidates", figures, (f"among {len(candidates)}",)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.scenario.tokenizer.decode(ids)
        return text


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
