"""The uncut model with adapters on all blocks: trained on batches, and asked the questions of a task.

It computes what the split model computes, so that it also answers with what a federation learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from isthmus.data.encoding import TextEncoder
from isthmus.data.silo_data import SiloData, padding
from isthmus.data.templates import Example
from isthmus.data.tokens import Tokens, collate
from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.families import family_of
from isthmus.model.optim import build_optimizer, set_rate
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import train_step
from isthmus.tasks.catalogue import named_task
from isthmus.tasks.scoring import ChoiceQuestion, best_choices, choice_log_probs
from isthmus.tasks.task import Item, Task

TOGETHER = 16
"""Rows that are read at a time where answers are written."""
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Question:
    """A row in tokens and as a question."""

    tokens: Tokens
    item: Item


class UncutModel:
    """One model, as a recipe's adapters make it.

    Args:
        recipe: its model, adapters, task and training.
        device: where it computes.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        folder = Path(recipe.model.path)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self._model.requires_grad_(False)
        self._part = Part("trunk", self._model, family_of(self._model.config), 0)
        adapters.add_adapter(self._part, recipe.lora, recipe.seed, freeze_a=False)
        self.untrained: Tensors = adapters.adapter_of(self._part)
        self.tokenizer = load_tokenizer(folder)
        self.recipe, self._pad = recipe, padding(self.tokenizer)

    def rows(self, *files: Path) -> list[Question]:
        """The rows of these files, as the recipe's silos read them."""
        section = self.recipe.silo[0].model_copy(update={"train": tuple(map(str, files)), "held_out": None})
        data = SiloData(section, self.recipe, self.tokenizer)
        self._choices = data.choices
        rows, texts = data.sets[0].rows, data.sets[0].texts
        return [Question(row, self._item(example)) for row, (_, example) in zip(rows, texts, strict=True)]

    def train(self, batches: Iterator[list[Tokens]], steps: int, rate: float) -> Tensors:
        """What the adapters become, from their start, by uncut name."""
        adapters.load_adapter(self._part, self.untrained)
        self._model.train()
        train = self.recipe.train.model_copy(update={"learning_rate": rate})
        optimizer = build_optimizer(adapters.trainable(self._part).values(), train)
        for number in range(1, steps + 1):
            set_rate(optimizer, train.rate(number, steps))
            train_step(self._model, optimizer, collate(next(batches), self._pad).to(self._model.device))
        return adapters.adapter_of(self._part)

    def load(self, tensors: Tensors) -> None:
        """Take these adapters; those that are not named are as at the start."""
        unknown = tensors.keys() - self.untrained.keys()
        assert not unknown, unknown
        adapters.load_adapter(self._part, {**self.untrained, **tensors})
        self._model.eval()

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The name of the likeliest choice of each, or what the model writes."""
        task = self.task
        if task is not None and task.longest:
            return self._written(questions, task)
        best = best_choices(
            self._log_probs(questions), [one.item.choices for one in questions], task.ranking if task else "total"
        )
        return [one.item.names[number] for one, number in zip(questions, best, strict=True)]

    @torch.no_grad()
    def surprise(self, questions: Sequence[Question]) -> float:
        """Mean of what the right answers cost, in nats: of choices one of them, of what is written a token."""
        if questions[0].item.choices:
            costs = []
            for one, scores in zip(questions, self._log_probs(questions), strict=True):
                right = scores[one.item.choices.index(one.item.answer)]
                costs.append(float(torch.tensor(scores).logsumexp(0)) - right)
            return sum(costs) / len(costs)
        total, weight = 0.0, 0
        for start in range(0, len(questions), TOGETHER):
            rows = [one.tokens for one in questions[start : start + TOGETHER]]
            batch = collate(rows, self._pad).to(self._model.device)
            total += float(self._model(**batch.inputs(), use_cache=False).loss) * batch.weight
            weight += batch.supervised
        return total / weight

    @property
    def task(self) -> Task | None:
        """The recipe's known task; None: it has templates of its own."""
        return named_task(self.recipe.task.name) if self.recipe.task.name else None

    @contextmanager
    def noised(self, scale: float, bottom: int, seed: int) -> Iterator[None]:
        """Within the ``with`` block hidden states have the noise that they cross to the trunk with.

        Args:
            scale: standard deviation.
            bottom: blocks before the noise.
        """
        draw = torch.Generator(self._model.device).manual_seed(seed)

        def add(states: torch.Tensor) -> torch.Tensor:
            return states + scale * torch.randn(states.shape, generator=draw, device=states.device)

        with self._crossing(bottom, add):
            yield

    @torch.no_grad()
    def magnitude(self, questions: Sequence[Question], bottom: int) -> float:
        """Mean magnitude of a coordinate of the hidden states behind so many blocks, of these prompts."""
        met: list[torch.Tensor] = []

        def note(states: torch.Tensor) -> torch.Tensor:
            met.append(states.abs().flatten())
            return states

        with self._crossing(bottom, note):
            for one in questions:
                self._model(torch.tensor([one.tokens.prompt], device=self._model.device))
        return float(torch.cat(met).mean())

    @contextmanager
    def _crossing(self, bottom: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Within the ``with`` block hidden states behind so many blocks are changed."""
        backbone = self._model.get_submodule(family_of(self._model.config).backbone)
        block = getattr(backbone, family_of(self._model.config).blocks)[bottom - 1]

        def hook(module: Any, given: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = block.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _item(self, example: Example) -> Item:
        if example.item is not None:
            return example.item
        task = self.recipe.task
        names = tuple(choice.strip() for choice in task.choices)
        return Item(example.prompt, example.answer, (example.answer.strip(),), task.continuations, names)

    def _log_probs(self, questions: Sequence[Question]) -> list[list[float]]:
        asked = [
            ChoiceQuestion(one.tokens.prompt, list(map(list, one.tokens.choices or self._choices))) for one in questions
        ]
        return choice_log_probs(self._model, asked, pad=self._pad)

    @torch.no_grad()
    def _written(self, questions: Sequence[Question], task: Task) -> list[str]:
        found = []
        end = TextEncoder(self.tokenizer).end
        order = sorted(range(len(questions)), key=lambda number: len(questions[number].tokens.prompt))
        for start in range(0, len(order), TOGETHER):
            some = [Tokens(questions[number].tokens.prompt, []) for number in order[start : start + TOGETHER]]
            batch = collate(some, self._pad).to(self._model.device)
            ids = self._model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=task.longest,
                do_sample=False,
                pad_token_id=self._pad,
                eos_token_id=end,
            )[:, batch.input_ids.shape[1] :]
            found += [stopped(text, task) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [text for _, text in sorted(zip(order, found, strict=True))]


def stopped(text: str, task: Task) -> str:
    """A written answer up to where the task stops."""
    text = text.lstrip()
    ends = [at for stop in task.stop if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()
