"""Scores of attacks: what they recovered against the truth, which no adversary sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rouge_score.rouge_scorer import RougeScorer

from isthmus.attacks.gradients.labels import relabel_clusters
from isthmus.attacks.membership.inference import separation
from isthmus.attacks.recovered import (
    AttributeGuesses,
    CandidateRanks,
    LabelGuesses,
    MembershipScores,
    Recovered,
    RecoveredTexts,
    RecoveredTokens,
)
from isthmus.attacks.score import Figure, score, share
from isthmus.audit.scenario import Scenario
from isthmus.data.tokens import Tokens
from isthmus.tasks.metrics import majority

SensitiveMask = Callable[[Sequence[int]], list[bool]]
"""From a row's tokens to whether each of them is sensitive."""
Scored = Iterator[tuple[str, dict[str, Figure], tuple[str, ...]]]
"""The scored part (``AttackResult.tokens``), its figures by name, and notes."""


@dataclass(frozen=True)
class AttackResult:
    """The scores of one attack by one adversary."""

    adversary: str
    attack: str
    victim: str
    rows: int
    """Number of rows that are scored."""
    own_rows: int
    """Number of rows that the adversary learned from."""
    seconds: float
    """Duration of the attack, without capturing."""
    tokens: str
    """The scored part. Recovered tokens: ``all``; ``text`` (without the template, the ends that all prompts share);
    ``sensitive``; ``response``; ``update`` (the rows behind an update). Identification: ``candidates``. Labels,
    attributes and membership: the method's name, or ``strongest`` for the best method."""
    figures: dict[str, Figure]
    """Scores by name (see ``attack.FIGURE_COLUMNS``)."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judge:
    """Scores attacks on one scenario.

    Args:
        inference: the victim's inference was attacked, not its training.
        sensitive: marks the sensitive tokens of a row; they are then also scored separately.
    """

    scenario: Scenario
    inference: bool
    sensitive: SensitiveMask | None = field(default=None)

    def results(
        self, adversary: str, attack: str, recovered: Recovered, seconds: float, own_rows: int
    ) -> list[AttackResult]:
        """One result per scored part.

        Args:
            seconds: duration of the attack.
            own_rows: number of rows that the adversary learned from.
        """
        rows, scored = self._scored(recovered)
        victim, seconds = self.scenario.victim, round(seconds, 1)
        return [
            AttackResult(adversary, attack, victim, rows, own_rows, seconds, part, figures, notes)
            for part, figures, notes in scored
        ]

    def _scored(self, recovered: Recovered) -> tuple[int, Scored]:
        """Number of scored rows, and the scores."""
        scenario = self.scenario
        if isinstance(recovered, LabelGuesses):
            return len(scenario.rows), self._labels(recovered)
        if isinstance(recovered, RecoveredTexts):
            return len(scenario.update_rows), self._texts(recovered)
        if isinstance(recovered, MembershipScores):
            return sum(map(len, scenario.membership_rows)), self._membership(recovered)
        if isinstance(recovered, CandidateRanks):
            return len(scenario.rows), self._identified(recovered)
        if isinstance(recovered, AttributeGuesses):
            return len(scenario.rows), self._attribute(recovered)
        return len(scenario.rows), self._response(recovered) if recovered.response else self._tokens(recovered)

    def _tokens(self, recovered: RecoveredTokens) -> Scored:
        """Scores on all tokens, on those outside the template, and on the sensitive ones."""
        truth = self.scenario.captured.truth
        masks = {"all": None, "text": None if self.inference else text_masks(self.scenario.rows)}
        if self.sensitive is not None:
            sensitive = [self.sensitive(row) for row in truth]
            masks |= {"sensitive": sensitive} if any(map(any, sensitive)) else {}
        for part, mask in masks.items():
            yield part, score(truth, recovered.ids, self._decode, only=mask), ()

    def _response(self, recovered: RecoveredTokens) -> Scored:
        """Scores on the answers' tokens, without the end-of-text token."""
        rows = self.scenario.rows
        whole = self.scenario.captured.truth if self.inference else [(*row.prompt, *row.answer) for row in rows]
        end = self.scenario.tokenizer.eos_token_id
        masks = [
            [place >= len(row.prompt) and token != end for place, token in enumerate(tokens)]
            for row, tokens in zip(rows, whole, strict=True)
        ]
        yield "response", score(whole, recovered.ids, self._decode, only=masks), ()

    def _labels(self, recovered: LabelGuesses) -> Scored:
        """Accuracy of each method, with the accuracy of the most common label and of the model itself."""
        choices = self.scenario.choices
        right = [choices.index(tuple(row.answer)) for row in self.scenario.rows]
        commonest = max(right, key=right.count)
        assert majority(right) == right.count(commonest) / len(right)
        baselines = {
            "majority": share([label == commonest for label in right]),
            "task_accuracy": self.scenario.task_accuracy,
        }
        guesses = {
            method: relabel_clusters(labels, right) if method in recovered.clusters else labels
            for method, labels in recovered.by.items()
        }
        figures = {
            method: {"accuracy": share([one == two for one, two in zip(labels, right, strict=True)]), **baselines}
            for method, labels in guesses.items()
        }
        best = max(figures, key=lambda method: figures[method]["accuracy"].value)
        yield "strongest", figures[best], (best, *recovered.notes)
        for method, one in figures.items():
            yield method, one, ()

    def _attribute(self, recovered: AttributeGuesses) -> Scored:
        """Accuracy of each method, beside always saying what most rows are."""
        truth = [not recovered.tokens.isdisjoint(row[:-1]) for row in self.scenario.captured.truth]
        commonest = max(truth, key=truth.count)
        chance = share([one == commonest for one in truth])
        for method, guesses in recovered.by.items():
            accuracy = share([one == two for one, two in zip(guesses, truth, strict=True)])
            yield method, {"accuracy": accuracy, "chance": chance}, recovered.notes

    def _texts(self, recovered: RecoveredTexts) -> Scored:
        """Scores of each row behind the update against the recovered text most like it, which favours the attack."""
        truth = [(*row.prompt, *row.answer) for row in self.scenario.update_rows]
        scorer = RougeScorer(["rouge1", "rougeL"])
        texts = [(text, self._decode(text)) for text in recovered.ids] or [([], "")]

        def likeness(reference: str, text: str) -> float:
            return sum(float(one.fmeasure) for one in scorer.score(reference, text).values())

        guesses = []
        for row in truth:
            reference = self._decode(list(row))
            guesses.append(max(texts, key=lambda pair: likeness(reference, pair[1]))[0])
        yield "update", score(truth, guesses, self._decode), recovered.notes

    def _membership(self, recovered: MembershipScores) -> Scored:
        """AUC and true positive rate of each method over training rows and held-out rows."""
        members, others = self.scenario.membership_rows
        is_member = [True] * len(members) + [False] * len(others)
        figures = {}
        for method, scores in recovered.by.items():
            separated = separation(scores, is_member)
            figures[method] = {"auc": separated.auc, "tpr_at_1_fpr": separated.tpr}
        best = max(figures, key=lambda method: figures[method]["auc"].value)
        yield "strongest", figures[best], (best, *recovered.notes)
        for method, one in figures.items():
            yield method, one, ()

    def _identified(self, recovered: CandidateRanks) -> Scored:
        """Share of rows whose candidate is ranked first, and among the first ten; chance is a random first rank."""
        candidates = [tuple(row.input) for row in self.scenario.candidates]
        pairs = zip(self.scenario.captured.truth, recovered.by_row, strict=True)
        hits = [[candidates[number] == right for number in ranked] for right, ranked in pairs]
        chance = 1 / len(candidates)
        figures = {
            "top1": share([any(ranked[:1]) for ranked in hits]),
            "top10": share([any(ranked[:10]) for ranked in hits]),
            "chance": Figure(chance, chance, chance),
        }
        yield "candidates", figures, (f"among {len(candidates)}",)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.scenario.tokenizer.decode(ids)
        return text


def text_masks(rows: Sequence[Tokens]) -> list[list[bool]] | None:
    """Masks of the tokens outside filler and template, that is outside the ends that all prompts share; None if they
    share no end, or if all prompts are equal."""
    prompts = [row.prompt for row in rows]
    before, after = _shared(prompts), _shared([prompt[::-1] for prompt in prompts])
    if len(set(map(tuple, prompts))) == 1 or not before + after:
        return None
    return [
        [
            before <= place < len(row.prompt) - after or len(row.prompt) <= place < len(row.input) - len(row.filler)
            for place in range(len(row.input))
        ]
        for row in rows
    ]


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin."""
    columns = zip(*rows, strict=False)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)))
