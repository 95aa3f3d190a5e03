"""Attacks on what leaves a silo: without defence, with published noise, by the private recipe; and the cost of each.

``make bench-privacy``, or ``python -m benchmarks.privacy.privacy PART ...`` for some of its parts. Two silos share one
task (hutto sentiment). Runs are kept in ``build/privacy``: what is there is not trained again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common.results import DEVICE, Results
from benchmarks.privacy import entailment, overhead
from benchmarks.privacy.channels import Detected, Size, changed_boundary, climb, note_sensitive
from benchmarks.privacy.overhead import STEPS
from benchmarks.privacy.runs import (
    CACHE,
    Values,
    accuracy,
    private_run,
    recipe_of,
    undefended,
    undefended_run,
    write_lines,
)
from isthmus.attacks.gradients.labels import LabelClassifier
from isthmus.audit.attack import AttackPlan, AttackResult, run_attacks
from isthmus.audit.capture import capture_pairs, restored_trunk, tapped_silo
from isthmus.audit.target import Target
from isthmus.data.silo_data import SiloData
from isthmus.engines.local import create_run
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.model.device import find_device
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import evaluate
from isthmus.tasks import metrics

VICTIMS, OWN = 60, 1000
PUBLISHED = (0.025, 0.1)
"""The published noise 0.02·√(π/2), and four times that."""
LABELLED = 300
FEW_ROWS = 8
"""Of the victim, where the search is slow."""


def main() -> None:
    parts = {
        "inversion": measure_inversion,
        "quality": measure_quality,
        "published": measure_published_noise,
        "private": measure_private,
        "sensitive": measure_sensitive,
        "trunk": measure_trunk,
        "rte": entailment.measure,
        "overhead": measure_overhead,
    }
    results = Results("privacy", "make bench-privacy", find_device(DEVICE))
    for part in sys.argv[1:] or parts:
        parts[part](results)
    print(f"written: {results.write(keep=len(sys.argv) > 1)}")


def measure_inversion(results: Results) -> None:
    """Cut (1, 1), nothing trained: what the trunk and a colluding silo read out of the hidden states."""
    for noise in (0.0, *PUBLISHED, 1.0):
        recipe = recipe_of(lambda values, noise=noise: undefended(values, noise, cut=(1, 1)))
        for found in attacked(Target(recipe), ("linear", "matching")):
            bound = 0.99 if noise == 0 and found.attack == "matching" else None
            name = f"cut (1, 1), noise {noise:g}: text tokens recovered, {found.attack}"
            results.add(name, found.figures["token_accuracy"].value, "share", at_least=bound)


def measure_quality(results: Results) -> None:
    """Both recipes' held-out accuracy."""
    quality = {"no defence": accuracy(undefended_run()), "private recipe": accuracy(private_run())}
    for name, value in quality.items():
        results.add(f"accuracy, {name}", value, "share")
    lost = 100 * (quality["no defence"] - quality["private recipe"])
    results.add("accuracy lost by the private recipe", lost, "points", at_most=2.0)


def measure_published_noise(results: Results) -> None:
    """The undefended run used with noise that it was not trained with."""
    run = undefended_run()
    for noise in PUBLISHED:
        noised = Target(changed_boundary(run.recipe(), {"forward": {"noise": noise}}), run)
        results.add(f"accuracy, noise {noise:g} in use only", held_out_accuracy(noised, "east"), "share")


def measure_private(results: Results) -> None:
    """Inversion of what crosses in a training step; beside it the same attacks where nothing or far more crosses."""
    run = private_run()
    climb(results, Target(run.recipe(), run), Size(public=CACHE / "public.txt"))
    learned, guessed = labels_recovered(Target(run.recipe(), run))
    results.add("private recipe: labels read off what crosses, by a colluder's classifier", learned, "share")
    results.add("private recipe: labels, always the most frequent", guessed, "share")


def measure_sensitive(results: Results) -> None:
    """The private recipe's rows that have the most identifiers, names and dates, which a few rows drawn hardly have."""
    run = private_run()
    recipe = run.recipe()
    counted, tokenizer = Detected(recipe), load_tokenizer(Path(recipe.model.path))
    data = SiloData(recipe.party("east"), recipe, tokenizer)
    lines = Path(recipe.party("east").train).read_text().splitlines()
    counts = [sum(counted(row.input)) for row in data.train]
    most = sorted(range(len(counts)), key=lambda number: -counts[number])[:FEW_ROWS]
    path = CACHE.resolve() / "east" / "sensitive.jsonl"
    write_lines(path, [lines[number] for number in most])
    silos = tuple(
        silo.model_copy(update={"train": (str(path),)}) if silo.name == "east" else silo for silo in recipe.silo
    )
    source = Target(recipe.model_copy(update={"silo": silos}), run)
    detected = Detected(recipe)
    order = AttackPlan(
        ("trunk+silo",), ("search",), "east", "west", FEW_ROWS, Size().own, CACHE / "public.txt", device=DEVICE
    )
    found = run_attacks(source, order, lambda told: print(f"  {told}", flush=True), detected)
    name = "private recipe, rows with most identifiers"
    note_sensitive(results, name, [one for one in found if one.tokens == "sensitive"], detected)


def measure_trunk(results: Results) -> None:
    """The trunk's part in the private recipe's accuracy: the same silo beside a trunk that answers with zeros."""
    run = private_run()
    source = Target(run.recipe(), run)
    with restored_trunk(source) as service:
        for name, answering in (("its trunk", service), ("a trunk that answers nothing", ZeroTrunk(source.recipe))):
            with tapped_silo(source, "east", answering) as (silo, _):
                rows = SiloData(source.recipe.party("east"), source.recipe, silo.tokenizer)
                found = evaluate(silo.model, rows)["accuracy"]
            results.add(f"private recipe's accuracy, one silo, with {name}", found, "share")


def labels_recovered(source: Target) -> tuple[float, float]:
    """Share of the victim's labels that the trunk reads off its hidden states after learning from the colluder's."""
    tokenizer = load_tokenizer(Path(source.recipe.model.path))
    crossed: dict[str, tuple[torch.Tensor, list[int]]] = {}
    for name in ("east", "west"):
        rows = SiloData(source.recipe.party(name), source.recipe, tokenizer).train[:LABELLED]
        pairs = capture_pairs(source, name, rows)
        crossed[name] = torch.stack([pair.crossing.hidden_LD[-1] for pair in pairs]), [row.answer[0] for row in rows]
    guess = LabelClassifier(*crossed["west"]).predict(crossed["east"][0])
    return metrics.accuracy(guess, crossed["east"][1]), metrics.majority(crossed["east"][1])


def measure_overhead(results: Results) -> None:
    """Share of mechanism, charges and ledger in real training steps and tokens, calibrated noise on both paths."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # on the disk that runs are on
        overhead.measure(results, create_run(recipe_of(calibrated), Path(folder) / "run"), "east")


def calibrated(values: Values) -> None:
    """The demo's cut with calibrated noise on whole states and gradients."""
    undefended(values, cut=(2, 2))
    path = {"mechanism": "dp_gaussian", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0}
    values["boundary"] |= {"forward": path, "gradient": path}
    values["train"] |= {"rounds": 1, "steps": STEPS, "evaluate": False}


def attacked(source: Target, attacks: tuple[str, ...]) -> list[AttackResult]:
    """By the trunk with a colluding silo, which has the public rows, too; figures of the text, not of the template."""
    order = AttackPlan(("trunk+silo",), attacks, "east", "west", VICTIMS, OWN, CACHE / "public.txt", device=DEVICE)
    found = run_attacks(source, order, lambda told: print(f"  {told}", flush=True))
    return [one for one in found if one.tokens == "text"]


def held_out_accuracy(source: Target, name: str) -> float:
    """Of one silo, with its trunk in this process."""
    with restored_trunk(source) as service, tapped_silo(source, name, service) as (silo, _):
        rows = SiloData(source.recipe.party(name), source.recipe, silo.tokenizer)
        return evaluate(silo.model, rows)["accuracy"]


if __name__ == "__main__":
    main()
