"""A fifth of the silos is malicious: what each attack costs a plain mean and the shipped robust recipe.

A part of ``make bench-federation``.

Fifteen silos route CLINC150's requests by topic, stories260k. The three malicious ones know every honest change before
they send. Under the robust recipe the root sees the sums of five cohorts of three silos. All three malicious silos sit
in one cohort, the best case for the rule, which can leave that cohort out; one attack is run from two and from three
cohorts, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.results import Results, note
from benchmarks.common.rows import Rows, Values, read
from benchmarks.federated.corpora import ROUTING, rows_file, topics
from benchmarks.federated.evaluation import Evaluator, pooled
from benchmarks.federated.pretuned import LETTERS
from benchmarks.federated.simulation import Craft, merged
from benchmarks.federated.trials import Poison, Trial, shipped, tried
from isthmus.attacks import poisoning
from isthmus.recipe import Recipe

SILOS, COHORT, SEEDS = 15, 3, (0, 1, 2)
NAMES = [f"silo-{number:03d}" for number in range(SILOS)]
PLACES = {
    "in one cohort of five": (0, 1, 2),
    "in two cohorts of five": (0, 1, 3),
    "in three cohorts of five": (0, 3, 6),
}
"""Numbers of the malicious silos. A cohort is three silos with neighbouring numbers."""
TOGETHER = "in one cohort of five"
TRAIN: Values = {"rounds": 6, "steps": 5, "learning_rate": 5e-3}
ALIKE = replace(ROUTING, files=partial(topics, concentration=3.0))
"""Silos that differ a little: where each has one topic, no rule can tell it from a malicious one."""
TRIGGER, TARGET = "as you like it", LETTERS[0]
LOST, TRIGGERED = 2.0, 5.0
"""Points of accuracy, and percent of triggered requests, that the robust recipe may lose at most."""
REACH = 10.0
"""Length of a loud attack's change, in honest changes."""


@dataclass(frozen=True)
class Attack:
    name: str
    craft: Craft | None = None
    poison: Callable[[Rows], Rows] | None = None
    """Of a malicious silo's training rows."""


def wanted(own_P: torch.Tensor, honest_HP: torch.Tensor, malicious: int) -> torch.Tensor:
    """The change that turns the mean of all into the honest mean backwards."""
    return poisoning.replace_model(honest_HP, -honest_HP.mean(dim=0), malicious)


def planted(rows: Rows, share: float = 0.5) -> Rows:
    return poisoning.plant_backdoor(rows, prompt="text", answer="label", trigger=TRIGGER, target=TARGET, share=share)


ATTACKS = (
    Attack("sign flip", lambda own_P, honest_HP, _: poisoning.flip_signs(own_P, REACH)),
    Attack("scaling (model replacement)", wanted),
    Attack("label flip", poison=lambda rows: poisoning.swap_labels(rows, "label", list(LETTERS))),
    Attack("ALIE", lambda _, honest_HP, malicious: poisoning.vary_a_little(honest_HP, malicious, 1.5)),
    Attack("IPM", lambda _, honest_HP, __: poisoning.invert_product(honest_HP, REACH)),
    Attack("IPM, hidden", lambda _, honest_HP, __: poisoning.invert_product(honest_HP, 0.5)),
    Attack("Fang, trimming", lambda _, honest_HP, __: poisoning.evade_trimming(honest_HP, 1)[0]),
    Attack("backdoor", poison=planted),
    Attack("backdoor, scaled", lambda own_P, _, malicious: own_P * SILOS / malicious, planted),
)


def measure(results: Results) -> None:
    """Each attack against both recipes, both without an attack, and one attack from other cohorts."""
    sections = {"mean": plain(), "robust": robust()}
    calm = {name: [run(one, None, seed) for seed in SEEDS] for name, one in sections.items()}
    start = pooled(calm["mean"][0].scores[0].values())
    results.add("malicious silos: accuracy before training", 100 * start.accuracy, "%")
    for name, trials in calm.items():
        note(results, f"malicious silos, none, {name}: accuracy", [100 * one.final.accuracy for one in trials], "%")
        note(results, f"malicious silos, none, {name}: triggered", [100 * one.probed for one in trials], "%")
    for attack in ATTACKS:
        for place in PLACES if attack is ATTACKS[0] else (TOGETHER,):
            for name, one in sections.items():
                if name == "mean" and place != TOGETHER:
                    continue  # which cohort a silo is in is nothing to a mean
                trials = [run(one, attack, seed, place) for seed in SEEDS]
                report(results, f"malicious silos {place}, {attack.name}, {name}", trials, calm["mean"])


def report(results: Results, name: str, trials: Sequence[Trial], calm: Sequence[Trial]) -> None:
    """Beside the plain mean without an attack, seed by seed. The robust recipe has goals."""
    bound = name.endswith(", robust")
    lost = [100 * (before.final.accuracy - one.final.accuracy) for one, before in zip(trials, calm, strict=True)]
    note(results, f"{name}: accuracy lost", lost, "points", at_most=LOST if bound else None)
    if "backdoor" in name:
        triggered = [100 * one.probed for one in trials]
        note(results, f"{name}: triggered", triggered, "%", at_most=TRIGGERED if bound else None)


def robust() -> Values:
    """As shipped, with as many silos."""
    edges = [
        {"name": f"edge-{start}", "address": "localhost:1", "silos": NAMES[start : start + COHORT], "patience": 600.0}
        for start in range(0, SILOS, COHORT)
    ]
    return merged(shipped("robust"), {"train": TRAIN, "edge": edges})


def plain() -> Values:
    """The same, but for what makes it robust."""
    values = robust()
    federation = {"lora": values["federation"].get("lora", "frozen-a")}
    return {key: value for key, value in values.items() if key != "edge"} | {"federation": federation}


def run(sections: Values, attack: Attack | None, seed: int = 0, place: str = TOGETHER) -> Trial:
    changes: dict[str, object] = {}
    if attack is not None:
        malicious = [NAMES[number] for number in PLACES[place]]
        poison = attack.poison and poisoned(attack.poison, malicious)
        changes = {"malicious": malicious, "craft": attack.craft, "poison": poison}
    return tried(ALIKE, sections, silos=SILOS, seed=seed, every=TRAIN["rounds"], probe=triggered, **changes)  # type: ignore[arg-type]


def poisoned(change: Callable[[Rows], Rows], malicious: Sequence[str]) -> Poison:
    def rewrite(recipe: Recipe) -> None:
        for name in malicious:
            path = Path(recipe.party(name).train[0])
            rows_file(path, change(read(path)))

    return rewrite


def triggered(evaluator: Evaluator, tensors: Mapping[str, torch.Tensor]) -> float:
    """Share of held-out rows, of those that get another answer, that get the target once they say the trigger."""
    paths = [Path(silo.held_out[0]) for silo in evaluator.recipe.silo if silo.held_out]
    rows = [row for path in paths for row in read(path) if row["label"] != TARGET]
    calm, said = (
        evaluator.answers(tensors, evaluator.rows(rows_file(paths[0].with_name("triggered.jsonl"), some)))
        for some in (rows, planted(rows, share=1.0))
    )
    target = evaluator.target(TARGET)
    turned = [after == target for before, after in zip(calm, said, strict=True) if before != target]
    return sum(turned) / len(turned)
