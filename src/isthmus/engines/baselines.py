"""Baselines of a run: the uncut model in this process, trained on one silo's rows or on all silos' rows.

A baseline draws the federation's rows in its order, takes its steps at its learning rates, and is measured on its
held-out rows. Nothing crosses, so that nothing is noised, compressed or charged.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import Tokens, collate
from isthmus.engines.chosen_round import LAST, best_round, chooses_best, journal_scores
from isthmus.engines.local import create_run, local_recipe
from isthmus.errors import ModelError, NotSupportedError, RecipeError, RunError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Part
from isthmus.model.device import find_device
from isthmus.model.families import family_of, uncut_class
from isthmus.model.optim import build_optimizer, restore_optimizer, set_rate
from isthmus.recipe import Recipe
from isthmus.silo.join import load_tokenizer
from isthmus.silo.trainer import evaluate, train_step
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory, RunDirectory

BaselineKind = Literal["alone", "pooled"]
"""``alone``: a model a silo, trained on its rows. ``pooled``: one model, trained on all silos' rows, in each step on
the rows of all silos' steps."""
BASELINES: tuple[BaselineKind, ...] = get_args(BaselineKind)
_TABLES = ("model", "lora", "task", "partition", "train")
"""Tables of a recipe that a baseline is trained by, with these keys of each silo's."""
_ROWS = ("train", "format", "columns", "steps", "most_rows")
_WATCHES = {"train.keep_rounds", "train.evaluate", "train.evaluate_rows", "train.micro_batches"}
"""Keys of these tables that it is not trained by."""
_CUTS = {"model.bottom", "model.top", "model.cut", "model.leakage", "model.moves"}
"""Nor by these, unless bottom is frozen: an uncut model has no cut."""


class UncutModel:
    """The uncut model with the recipe's adapters on every block, in eval mode; both factors of them train.

    Raises:
        ModelError: the model folder cannot be used, or the adapters do not fit it.
        NotSupportedError: the model is the text part of a multimodal one.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        transformers_logging.disable_progress_bar()
        checkpoint = Checkpoint(recipe.model.path)
        family = family_of(checkpoint.config)
        if family.uncut_backbone:
            raise NotSupportedError(
                f"{recipe.model.path} is a model of images and text, of which there are no baselines",
                remedy="compare with a text model, or leave --baseline out",
            )
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.model = _loaded(checkpoint, recipe, device)
        self._part = Part("trunk", self.model, family, 0)
        adapters.add_adapter(self._part, recipe.lora, recipe.seed, freeze_a=False)
        adapters.load_adapter(self._part, adapters.starting_tensors(checkpoint.config, recipe))
        if recipe.lora.freeze_bottom:
            _freeze(self._part, [f"{family.block_prefix()}{number}." for number in range(recipe.model.bottom)])
        self._untrained = adapters.adapter_of(self._part)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name."""
        return adapters.trainable(self._part)

    def tensors(self) -> adapters.TensorDict:
        """A copy of the adapters."""
        return adapters.adapter_of(self._part)

    def load(self, tensors: adapters.TensorDict | None = None) -> None:
        """Load adapters; None: the untrained ones."""
        adapters.load_adapter(self._part, self._untrained if tensors is None else tensors)


def baseline_run(recipe: Recipe, path: Path) -> RunDirectory:
    """The run directory at this path, for a recipe's baselines: that of the federation, or a new one.

    Raises:
        RunError: the run there was made by a recipe with other rows, another model or another training.
        DataError: as of ``create_run``.
    """
    if not (path / "recipe.toml").exists():
        return create_run(recipe, path)
    run = RunDirectory.open(path)
    if other := _differing(_learned_by(local_recipe(recipe, path)), _learned_by(run.recipe())):
        raise RunError(
            f"{path} holds a run of another recipe: {', '.join(other)} differs",
            remedy="name another directory with --run-dir, or train the baseline by the run's own recipe: "
            f"isthmus run --resume {path} --baseline alone|pooled",
        )
    return run


def train_baseline(run: RunDirectory, kind: BaselineKind, notify: Callable[[str], None] = lambda line: None) -> None:
    """Train a baseline of the run's recipe, from the last round that is saved.

    It is kept in the run directory's ``baselines``, where ``evaluation.evaluate_run`` finds it.

    Args:
        notify: called with a line a round.

    Raises:
        DataError: a row or file is unusable.
        ModelError, NotSupportedError: as of ``UncutModel``.
        RecipeError: nothing trains by the recipe.
        RunError: another process trains baselines there, one was begun by another recipe, or training diverged.
    """
    recipe = run.recipe()
    if not recipe.train.rounds:
        raise RecipeError(
            "by the recipe nothing trains (train.rounds = 0), so that there is nothing to compare with",
            remedy="raise train.rounds, or leave --baseline out",
        )
    with run.locked(role="baselines"):
        model = UncutModel(recipe, recipe.trunk.device)
        silos = [SiloData(silo, recipe, model.tokenizer) for silo in recipe.silo]
        if kind == "pooled":
            _Training(model, recipe, silos, _folder(run, kind), "all rows in one place", notify).run()
        else:
            for silo in silos:
                folder = _folder(run, kind, silo.name)
                _Training(model, recipe, [silo], folder, f"{silo.name} alone", notify).run()


def trained_baseline(
    run: RunDirectory, kind: BaselineKind, silo: str, round: str | int | None = None
) -> adapters.TensorDict | None:
    """The adapters of a baseline that was trained to the end; None: there is none.

    Args:
        silo: whose baseline; of the pooled one any.
        round: as in ``opening.open_run``; the best is the baseline's own best one.

    Raises:
        RunError: it was trained by another recipe than the run's, or not to the end, or it lacks the round.
    """
    directory, recipe = _folder(run, kind, silo), run.recipe()
    if not directory.rounds():
        return None
    number = directory.last_round()
    if number < recipe.train.rounds:
        raise RunError(
            f"the baseline in {directory.path} has {number} of {recipe.train.rounds} rounds",
            remedy=f"go on with 'isthmus run --resume {run.path} --baseline {kind}', or remove the folder",
        )
    if chooses_best(run, round):
        names = [silo] if kind == "alone" else [one.name for one in recipe.silo]
        scores = [journal_scores(directory.path / "metrics.jsonl", name) for name in names]
        number = best_round(scores, directory.rounds()) or number
    elif round is not None and round != LAST:
        number = int(round)
        if number not in directory.rounds():
            raise RunError(
                f"the baseline in {directory.path} keeps no round {number}",
                remedy=f"name one of these: {', '.join(map(str, sorted(directory.rounds())))}",
            )
    state = _opened(directory, number, recipe)
    tensors: adapters.TensorDict = state["adapter"]
    return tensors


def baseline_scores(run: RunDirectory, kind: BaselineKind) -> dict[str, dict[str, float]]:
    """What a baseline's last evaluation in training found, by silo: ``accuracy``, or ``loss`` and ``perplexity``."""
    found: dict[str, dict[str, float]] = {}
    for silo in run.recipe().silo:
        for line in read_journal(_folder(run, kind, silo.name).path / "metrics.jsonl"):
            if line["event"] == "evaluation" and line["silo"] == silo.name:
                found[silo.name] = line["scores"]
    return found


class _Training:
    """One model's training on the rows of one silo, or of all silos together."""

    def __init__(
        self,
        model: UncutModel,
        recipe: Recipe,
        silos: Sequence[SiloData],
        directory: RoleDirectory,
        title: str,
        notify: Callable[[str], None],
    ) -> None:
        self._model, self._recipe, self._silos = model, recipe, silos
        self._directory, self._title, self._notify = directory, title, notify
        directory.keep_as(recipe.train)
        self._journal = directory.journal("metrics")
        self._measured = {
            (line["round"], line["silo"])
            for line in read_journal(directory.path / "metrics.jsonl")
            if line["event"] == "evaluation"
        }
        self._optimizer = build_optimizer(model.trained().values(), recipe.train)

    def run(self) -> None:
        """Train and measure to the last round."""
        rounds = self._recipe.train.rounds
        done = self._continue()
        self._measure(done)
        for number in range(done + 1, rounds + 1):
            loss = self._train(number)
            state = {"adapter": self._model.tensors(), "optimizer": self._optimizer.state_dict()}
            self._directory.save_round(number, state | {"recipe": json.dumps(_learned_by(self._recipe))})
            self._measure(number)
            self._notify(f"{self._title}: round {number}/{rounds}, loss {loss:.3f}")

    def _continue(self) -> int:
        """Restore the last saved round, whose number is returned; without one begin untrained, with 0."""
        self._model.load()
        number = self._directory.last_round()
        if number:
            state = _opened(self._directory, number, self._recipe)
            self._model.load(state["adapter"])
            restore_optimizer(self._optimizer, state["optimizer"])
        return number

    def _train(self, round: int) -> float:
        """One round; returns the last step's loss."""
        loss = math.nan
        for number, (rate, rows) in enumerate(self._steps(round), 1):
            set_rate(self._optimizer, rate)
            batch = collate(rows, self._silos[0].pad).to(self._model.model.device)
            with adapters.dropout(self._model.model, f"{self._recipe.seed}/{self._title}/{round}/{number}"):
                step = train_step(self._model.model, self._optimizer, batch)
            if step.loss is None or not math.isfinite(step.loss):
                raise RunError(f"{self._title}: training diverged in round {round}", remedy="lower train.learning_rate")
            loss = step.loss
            line = {"event": "step", "round": round, "step": number, "loss": loss, "tokens": step.tokens}
            self._journal.append(line | {"seconds": float(f"{step.seconds:.3f}")})
        return loss

    def _steps(self, round: int) -> Iterator[tuple[float, list[Tokens]]]:
        """Learning rate and rows of each step: the rows of all silos that take this step in a federation."""
        plans = [silo.round_steps(round) for silo in self._silos]
        drawn = zip_longest(*(silo.round_batches(round) for silo in self._silos), fillvalue=[])
        for number, rows in enumerate(drawn, 1):
            rate = self._recipe.rate([(plan, number) for plan in plans if number <= plan.count])
            yield rate, [row for own in rows for row in own]

    def _measure(self, completed: int) -> None:
        """Measure and record the quality on each silo's held-out rows: after the last round, if the federation does,
        and after each among which the best is chosen."""
        train = self._recipe.train
        if not train.evaluates_after(completed) or (train.evaluate != "best" and completed != train.rounds):
            return
        for silo in self._silos:
            rows = silo.measured_rows()
            if not rows or (completed, silo.name) in self._measured:
                continue
            self._measured.add((completed, silo.name))
            started = time.perf_counter()
            scores = evaluate(self._model.model, silo, rows)
            line = {"event": "evaluation", "round": completed, "silo": silo.name, "scores": scores}
            self._journal.append(line | {"seconds": round(time.perf_counter() - started, 3)})


def _folder(run: RunDirectory, kind: BaselineKind, silo: str = "") -> RoleDirectory:
    path = run.path / "baselines" / kind
    return RoleDirectory(path / silo if kind == "alone" else path)


def _opened(directory: RoleDirectory, number: int, recipe: Recipe) -> dict[str, Any]:
    """A baseline's state after this round, if it was trained by this recipe."""
    state = directory.load_round(number)
    if other := _differing(json.loads(state["recipe"]), _learned_by(recipe)):
        raise RunError(
            f"the baseline in {directory.path} was trained by another recipe: {', '.join(other)} differs",
            remedy="remove that folder and train it again, or name another run directory",
        )
    return state


def _learned_by(recipe: Recipe) -> dict[str, Any]:
    """What a baseline is trained by, by key."""
    values = recipe.model_dump(mode="json")
    tables = {table: values[table] or {} for table in _TABLES}
    silos = {f"silo.{one['name']}": {key: one[key] for key in _ROWS} for one in values["silo"]}
    keys = {f"{table}.{key}": value for table, inner in (tables | silos).items() for key, value in inner.items()}
    other = _WATCHES if recipe.lora.freeze_bottom else _WATCHES | _CUTS
    return {"seed": recipe.seed} | {key: value for key, value in keys.items() if key not in other}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _loaded(checkpoint: Checkpoint, recipe: Recipe, device: str) -> PreTrainedModel:
    kind = uncut_class(checkpoint.config)
    try:
        model: PreTrainedModel = kind.from_pretrained(checkpoint.folder, dtype=getattr(torch, recipe.model.dtype))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load the uncut model {checkpoint.folder}: {str(error).splitlines()[0]}",
            remedy="check model.path; quantized models need the package that wrote them",
        ) from error
    return model.to(find_device(device)).requires_grad_(False).eval()


def _freeze(part: Part, prefixes: Sequence[str]) -> None:
    for name, parameter in adapters.adapter_parameters(part).items():
        if name.startswith(tuple(prefixes)):
            parameter.requires_grad_(False)
