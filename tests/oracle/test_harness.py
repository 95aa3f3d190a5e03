"""lm-eval's scores with our task files are ours, for the split and the uncut model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from isthmus.silo.join import load_tokenizer
from isthmus.tasks.harness import HARNESS_MEASURES, write_harness_task
from isthmus.tasks.scoring import ChoiceQuestion, best_choices, choice_log_probs
from isthmus.tasks.task import Item, Ranking, Task
from tests.oracle.conftest import BuildTwins

pytestmark = pytest.mark.filterwarnings("ignore")
RANKINGS: tuple[Ranking, ...] = ("total", "length", "unconditioned")


def items(count: int = 24) -> list[Item]:
    draw = random.Random(1)

    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(10, 90)}" for _ in range(draw.randint(1, most)))

    def item() -> Item:
        names = tuple("abc")
        choices = tuple(f" {words(4)}" for _ in names)
        right = draw.randrange(3)
        return Item(words(20), choices[right], (names[right],), choices, names)

    return [item() for _ in range(count)]


def harness_accuracy(model: Any, tokenizer: Any, name: str, folder: Path, measure: str) -> float:
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = evaluator.simple_evaluate(harness, tasks=[name], task_manager=manager, bootstrap_iters=0)
    return float(found["results"][name][f"{measure},none"])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_accuracies_are_equal(
    ranking: Ranking, twins_of: BuildTwins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    twins, asked = twins_of("llama", (2, 1)), items()
    tokenizer = load_tokenizer(Path(twins.split.config._name_or_path))
    task = Task("words", lambda _: asked, ("accuracy",), ranking)
    name = write_harness_task(task, asked, tmp_path)

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    questions = [ChoiceQuestion(tokens(item.prompt), [tokens(one) for one in item.choices]) for item in asked]
    begin = tokenizer.bos_token_id  # the harness reads it before what follows nothing
    alone = [ChoiceQuestion([begin], one.choices) for one in questions]
    texts = [item.choices for item in asked]
    for model in twins.both:
        scores = choice_log_probs(model, questions), choice_log_probs(model, alone)
        best = best_choices(scores[0], texts, ranking, scores[1])
        ours = sum(item.names[number] in item.right for item, number in zip(asked, best, strict=True)) / len(asked)
        assert harness_accuracy(model, tokenizer, name, tmp_path, HARNESS_MEASURES[ranking]) == pytest.approx(ours)
