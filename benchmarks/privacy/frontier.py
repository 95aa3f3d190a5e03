"""The frontier: what an attack recovers, what is left of the quality, and which epsilon follows, over cuts and noise.

``make bench-frontier``, or ``python -m benchmarks.privacy.frontier TASK ...``. One uncut model a task is tuned without
any noise (``tuned``), then used through every point's boundary: noise is met in use only. Points that say "learned"
have a model of their own, tuned by one silo through that boundary (``learned``).
The adversary is a trunk with a colluding silo; it knows all weights. Points stay in ``build/frontier``: what is there
is not measured again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer
from transformers.utils import logging as transformers_logging

from benchmarks.common.results import DEVICE, RESULTS, Results
from benchmarks.privacy.frontier_plot import draw
from benchmarks.privacy.learned import learned
from benchmarks.privacy.points import EPOCHS, Point, classification, epsilon, generation, norms
from benchmarks.privacy.tasks import CACHE, TASKS, Task
from benchmarks.privacy.tuned import tuned
from isthmus.attacks.catalogue import ATTACKS
from isthmus.attacks.inversion.matching import MatchingSettings, match_vocabulary
from isthmus.attacks.inversion.transformer import InverterSettings, invert_by_transformer
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.recovered import RecoveredTokens
from isthmus.attacks.score import score
from isthmus.audit.capture import measure_accuracy
from isthmus.audit.scenario import AttackPlan, Scenario
from isthmus.audit.target import Target
from isthmus.data.silo_data import SiloData
from isthmus.demo.assets import smollm2
from isthmus.model.device import find_device
from isthmus.privacy.detokenizer import Detokenizer
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe, SensitivitySection
from isthmus.silo.join import load_tokenizer
from isthmus.storage.files import writing

SCALED = 32
"""Rows that tell how large what crosses is."""
SURE = 0.9
"""Share recovered above which no costlier attack is made."""
SEARCH = MatchingSettings(proposals=32, wider=(128,), beam=2, whole=0)
"""Of vocabulary matching: a search through the whole vocabulary behind a deep bottom takes minutes a token."""
SENSITIVE = SensitivitySection(
    detectors=["name", "date", "phone", "email", "record-number", "national-id"],  # type: ignore[arg-type]
    classes={"high": {}},  # type: ignore[dict-item]
)


@dataclass(frozen=True)
class Size:
    """Size of the measurement at a point."""

    held_out: int = 120
    victims: int = 24
    own: int = 200
    matched: int = 6
    """Of the victim's rows, for vocabulary matching."""
    epochs: int = 3


LONG = Size(victims=16, own=80, matched=2)
"""For dialogues, whose rows are several times as long."""


@dataclass(frozen=True)
class Outcome:
    """Result of a point."""

    task: str
    name: str
    cut: tuple[int, int]
    mechanism: str
    setting: str
    quality: dict[str, float]
    """``accuracy``, or ROUGE of greedy answers."""
    recovered: dict[str, float]
    """Shares of tokens, by the best attack: of the ``text``, or of ``prompt``, ``response`` and ``sensitive`` ones."""
    attack: str
    """The best on the text or the prompt."""
    tried: list[str]
    """All that were made."""
    epsilon: float | None
    """Of one forward of a row of median length; None: infinite."""
    epsilon_run: float | None
    """Of ``EPOCHS`` forwards."""
    seconds: float


def main() -> None:
    transformers_logging.disable_progress_bar()
    results, outcomes = Results("frontier", "make bench-frontier", find_device(DEVICE)), list[Outcome]()
    for name in sys.argv[1:] or TASKS:
        task = TASKS[name]
        base = smollm2(Path("build/demo")).resolve()
        points, size = (generation(), LONG) if task.generates else (classification(), Size())
        for outcome in measured(task, base, points, size):
            outcomes.append(outcome)
            note(results, outcome)
            results.write(keep=True)
            draw(outcomes, RESULTS / "frontier.png")
    Console().print(table(outcomes))


def measured(task: Task, base: Path, points: Sequence[Point], size: Size) -> Iterator[Outcome]:
    """Each point's outcome, as it was measured before or else now."""
    for point in points:
        path = CACHE / "points" / task.name / f"{point.name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            outcome = outcome_of(task, base, point, size)
            with writing(path) as temporary:
                temporary.write_text(json.dumps(asdict(outcome), indent=1))
        told = json.loads(path.read_text())
        yield Outcome(**{**told, "cut": tuple(told["cut"])})


def outcome_of(task: Task, base: Path, point: Point, size: Size) -> Outcome:
    started = time.perf_counter()
    source = learned(task, base, point) if point.learned else Target(recipe_of(task, tuned(task, base), point))
    recipe = source.recipe
    order = AttackPlan(("trunk+silo",), ("linear",), "east", "west", size.victims, size.own, inference=task.generates)
    bench = Scenario(source, order, lambda told: None)
    attack, recovered, tried = best_attack(bench, task, point, size)
    vectors = int(median(row.crossing(recipe.boundary.tail) for row in bench.rows))
    spent = [epsilon(recipe.boundary, vectors, times) for times in (1, EPOCHS)]
    return Outcome(
        task.name,
        point.name,
        point.cut,
        point.mechanism,
        point.setting,
        written(bench) if task.generates else {"accuracy": accuracy(source, size.held_out)},
        recovered,
        attack,
        tried,
        *(value if math.isfinite(value) else None for value in spent),
        round(time.perf_counter() - started, 1),
    )


def recipe_of(task: Task, model: Path, point: Point) -> Recipe:
    """With noise measured in what crosses at this cut."""
    plain = task.recipe(model, point.cut, dict(point.shape))
    rows = SiloData(plain.party("west"), plain, load_tokenizer(model)).train[:SCALED]
    return task.recipe(model, point.cut, point.boundary(*norms(plain, rows)))


def accuracy(source: Target, count: int) -> float:
    """On so many held-out rows, through the boundary."""
    rows = SiloData(source.recipe.party("east"), source.recipe, load_tokenizer(Path(source.recipe.model.path)))
    return measure_accuracy(source, "east", rows.held_out[:count])


def written(bench: Scenario) -> dict[str, float]:
    """ROUGE (F1) of the greedy answers that crossed against the notes that people wrote."""
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scored = [
        scorer.score(
            bench.tokenizer.decode(row.answer, skip_special_tokens=True),
            bench.tokenizer.decode(truth[len(row.prompt) :], skip_special_tokens=True),
        )
        for row, truth in zip(bench.rows, bench.captured.truth, strict=True)
    ]
    return {name: fmean(float(one[name].fmeasure) for one in scored) for name in ("rouge1", "rougeL")}


def best_attack(bench: Scenario, task: Task, point: Point, size: Size) -> tuple[str, dict[str, float], list[str]]:
    """The attack that recovers most of the text (or prompt), the most that any recovers of each kind of token, and all
    that were made."""
    masks = masks_of(bench, task)
    main = next(iter(masks))
    best: dict[str, tuple[float, str]] = {}
    tried: list[str] = []
    for name, found in attacks(bench, task, point, size, lambda: best[main][0]):
        tried.append(name)
        for of, mask in masks.items():
            if found.response and of != "response":
                continue
            count = len(found.ids)
            if not any(map(any, mask[:count])):
                continue
            figures = score(bench.captured.truth[:count], found.ids, bench.tokenizer.decode, only=mask[:count])
            share = figures["token_accuracy"].value
            best[of] = max(best.get(of, (-1.0, "")), (share, name))
        print(f"  {task.name}, {point.name}: {name}: { {of: f'{value:.3f}' for of, (value, _) in best.items()} }")
    return best[main][1], {of: value for of, (value, _) in best.items()}, tried


def attacks(
    bench: Scenario, task: Task, point: Point, size: Size, reached: Callable[[], float]
) -> Iterator[tuple[str, RecoveredTokens]]:
    """The cheap ones first; costlier ones where those do not recover nearly all."""
    view, device = bench.view("trunk+silo"), find_device(DEVICE)
    knowledge = Knowledge(view, device=device)

    def made(attack: Callable[[], Any]) -> Any:
        with device:
            return attack()

    yield "linear", made(lambda: ATTACKS["linear"](knowledge))
    if task.generates:
        yield "lens", made(lambda: ATTACKS["lens"](knowledge))
    if reached() >= SURE:
        return
    yield (
        "transformer",
        made(lambda: RecoveredTokens(invert_by_transformer(knowledge, InverterSettings(epochs=size.epochs)))),
    )
    if reached() >= SURE:
        return
    if "tail" in point.shape:
        yield "decoder", made(lambda: ATTACKS["decoder"](knowledge))
    elif size.matched:
        some = replace(view, crossings=view.crossings[: size.matched])
        yield "matching", made(lambda: RecoveredTokens(match_vocabulary(Knowledge(some, device=device), SEARCH)))


def masks_of(bench: Scenario, task: Task) -> dict[str, list[list[bool]]]:
    """Which tokens of each row count for each kind; what the recipe's template says counts for none."""
    rows, truth = bench.rows, bench.captured.truth
    template = template_tokens([row.prompt for row in rows])
    asked = [
        [place < len(row.prompt) - template for place in range(len(one))] for row, one in zip(rows, truth, strict=True)
    ]
    if not task.generates:
        return {"text": asked}
    answered = [[place >= len(row.prompt) for place in range(len(one))] for row, one in zip(rows, truth, strict=True)]
    sensitivity = Sensitivity(SENSITIVE)
    return {"prompt": asked, "response": answered, "sensitive": [sensitive(bench, sensitivity, one) for one in truth]}


def template_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts end with."""
    columns = zip(*(prompt[::-1] for prompt in prompts), strict=False)
    return next((place for place, column in enumerate(columns) if len(set(column)) > 1), 0)


def sensitive(bench: Scenario, sensitivity: Sensitivity, tokens: Sequence[int]) -> list[bool]:
    """Which tokens stand for names, dates, numbers and the like."""
    reading = Detokenizer(sensitivity, bench.tokenizer.decode)
    reading.extend(tokens)
    return [number > 0 for number in reading.classes]


def note(results: Results, outcome: Outcome) -> None:
    """As rows of the results."""
    place = f"{outcome.task}, {outcome.name}"
    for name, value in outcome.quality.items():
        results.add(f"{place}: {name}", value, "share")
    for of, value in outcome.recovered.items():
        told = f" ({outcome.attack})" if of in ("text", "prompt") else ""
        results.add(f"{place}: {of} tokens recovered{told}", value, "share")
    for name, spent in (("one forward", outcome.epsilon), (f"{EPOCHS} epochs", outcome.epsilon_run)):
        results.add(f"{place}: epsilon of a row, {name}", math.inf if spent is None else spent, "epsilon")


def table(outcomes: Sequence[Outcome]) -> Table:
    """For a terminal."""
    shown = Table("task", "cut", "mechanism", "setting", "quality", "recovered", "by", "epsilon", f"× {EPOCHS}")
    for one in outcomes:
        cells = [
            "  ".join(f"{name} {value:.3f}" for name, value in part.items()) for part in (one.quality, one.recovered)
        ]
        spent = ["∞" if value is None else f"{value:.3g}" for value in (one.epsilon, one.epsilon_run)]
        shown.add_row(one.task, str(one.cut), one.mechanism, one.setting, *cells, one.attack, *spent)
    return shown


if __name__ == "__main__":
    main()
