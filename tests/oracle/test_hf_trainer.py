"""The ``Trainer`` of transformers trains the split model as it trains the uncut one: with its own optimizer, schedule,
clipping and accumulation, a second time, from a checkpoint, and back to the best one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

from isthmus.errors import BudgetExhausted, MismatchError, ProtocolError
from isthmus.model import adapters
from isthmus.privacy.accountant import Account
from tests.conftest import VOCABULARY
from tests.features.silo.test_spent_budgets import CALIBRATED, COST, DELTA
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Twins, assert_same, distance, lora_of, padded

STEPS, ACCUMULATED, BATCH, RATE = 3, 2, 2, 0.01
Row = tuple[list[int], list[int]]
SGD = {"optim": "sgd", "learning_rate": 0.05}
SETTINGS: dict[str, dict[str, Any]] = {
    "as they come": {},
    "adam": {"optim": "adamw_torch", "weight_decay": 0.1, "adam_beta2": 0.9, "warmup_steps": 2},
    "sgd": {**SGD, "max_grad_norm": 2.0, "lr_scheduler_type": "cosine", "optim_args": "momentum=0.9"},
    "labels smoothed": {**SGD, "label_smoothing_factor": 0.2},
    "unclipped": {**SGD, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
}


@pytest.fixture
def twins(twins_of: BuildTwins) -> Twins:
    return twins_of("llama", (2, 1))


def rows(seed: int = 0) -> list[Row]:
    """Rows of unlike length, of which unlike shares have labels, first tokens too (which no loss counts)."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(STEPS * ACCUMULATED * BATCH):
        ids = torch.randint(4, VOCABULARY, (5 + 3 * number,), generator=draw).tolist()
        hidden = number % 4 * 2
        found.append((ids, [-100] * hidden + ids[hidden:]))
    return found


def trainer_of(model: PreTrainedModel, folder: Path, **settings: Any) -> Trainer:
    values: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": RATE,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **values | settings),
        data_collator=lambda batch: padded(batch, "right"),
        train_dataset=rows(),
        eval_dataset=rows(1)[:4],
    )


def logged(trainer: Trainer, *names: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history for name in names if name in line]


def assert_equal(twins: Twins, split: Trainer, whole: Trainer) -> None:
    """The same losses and rates at every step, and norms and adapters up to what Adam makes of rounding."""
    for names, tolerance in ((("loss", "eval_loss", "learning_rate"), 1e-5), (("grad_norm",), 1e-4)):
        here, there = (logged(trainer, *names) for trainer in (split, whole))
        assert len(there) >= STEPS
        assert here == pytest.approx(there, rel=tolerance)
    expected = {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}
    assert_same(twins.split_adapter(), expected, 1e-3)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_trainer_gives_the_losses_and_adapters_it_gives_the_uncut_model(
    settings: dict[str, Any], twins: Twins, tmp_path: Path
) -> None:
    before = twins.split_adapter()
    split, whole = (trainer_of(model, tmp_path, **settings) for model in twins.both)
    for trainer in (split, whole):
        trainer.train()
        trainer.evaluate()
    assert_equal(twins, split, whole)
    after = twins.split_adapter()
    moved = {name for name in after if distance(after[name], before[name]) > 1e-4}
    assert moved == {name for name, parameter in lora_of(twins.whole).items() if parameter.requires_grad}


def test_a_second_training_goes_on_where_the_first_ended(twins: Twins, tmp_path: Path) -> None:
    first, second = ([trainer_of(model, tmp_path) for model in twins.both] for _ in range(2))
    for trainer in (*first, *second):
        trainer.train()
    assert_equal(twins, second[0], second[1])


def test_training_resumed_from_a_checkpoint_is_training_that_was_never_broken_off(
    twins_of: BuildTwins, tmp_path: Path
) -> None:
    """Another process, as far as the trunk can tell, resumes."""
    twins = twins_of("llama", (2, 1))
    whole = trainer_of(twins.whole, tmp_path / "whole")
    whole.train()
    first = trainer_of(twins.split, tmp_path / "split", save_strategy="steps", save_steps=2)
    first.train()
    assert twins.service._training._store.rounds() == {0, 1, 2}
    with torch.no_grad():
        for part in twins.split.ends:
            for parameter in adapters.trainable(part).values():
                parameter.zero_()
    again = trainer_of(twins.split, tmp_path / "split", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "split" / "checkpoint-2"))
    assert_equal(twins, again, whole)


def test_the_best_model_comes_back_whole(twins: Twins, tmp_path: Path) -> None:
    """The rate is so high that the first evaluation is the best."""
    settings = {"learning_rate": 5.0, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    trainers = [
        trainer_of(model, tmp_path / name, save_steps=1, load_best_model_at_end=True, **settings)
        for name, model in zip(("split", "whole"), twins.both, strict=True)
    ]
    for trainer in trainers:
        trainer.train()
    best, last = min(logged(trainers[0], "eval_loss")), logged(trainers[0], "eval_loss")[-1]
    assert best < last
    assert trainers[0].evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
    trainers[0].save_model(str(tmp_path / "best"))
    trained = twins.split_adapter()
    trainers[0].train()
    twins.split.load_state_dict(load_file(tmp_path / "best" / "model.safetensors"), strict=False)
    assert_same(twins.split_adapter(), trained, 0.0)


def test_trainer_saves_a_peft_folder(twins: Twins, tmp_path: Path) -> None:
    trainer_of(twins.split, tmp_path).save_model(str(tmp_path / "saved"))
    config = LoraConfig.from_pretrained(str(tmp_path / "saved"))
    assert (config.r, config.lora_alpha, {one.rpartition(".")[2] for one in config.target_modules}) == (
        8,
        16.0,
        {"q_proj", "v_proj"},
    )
    assert config.base_model_name_or_path == twins.whole.config._name_or_path
    ends = {name: tensor for part in twins.split.ends for name, tensor in adapters.adapter_of(part).items()}
    named = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert_same({name.removeprefix("base_model.model."): tensor for name, tensor in named.items()}, ends, 0.0)


def test_a_model_saved_with_another_trunk_or_cut_is_refused(twins_of: BuildTwins, tmp_path: Path) -> None:
    twins, other, cut = twins_of("llama", (2, 1)), twins_of("llama", (2, 1)), twins_of("llama", (1, 1))
    trainer_of(twins.split, tmp_path).train()
    twins.split.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    before = cut.split_adapter()
    with pytest.raises(ProtocolError, match="no state of round 1"):
        other.split.load_state_dict(saved, strict=False)
    trainer_of(other.split, tmp_path, learning_rate=0.1).train()
    other.split.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="round 1 is not the one"):
        other.split.load_state_dict(saved, strict=False)
    with pytest.raises(MismatchError, match=r"cut \[2, 1\], this one \[1, 1\]"):
        cut.split.load_state_dict(saved, strict=False)
    rank = twins_of("llama", (2, 1), sections={"lora": {"rank": 4}})
    with pytest.raises(MismatchError, match="rank 8, this one 4"):
        rank.split.load_state_dict(saved, strict=False)
    with pytest.raises(MismatchError, match="which of the trunk's rounds"):
        cut.split.load_state_dict(cut.split_adapter(), strict=False)
    assert_same(cut.split_adapter(), before, 0.0)


def test_a_spent_record_ends_training_within_its_budget_and_can_be_told_before(
    twins_of: BuildTwins, tmp_path: Path
) -> None:
    """Each row's budget bears one step, and half of the rows come twice."""
    budget = Account(2 * COST).epsilon(DELTA).value
    sections = {"boundary": {"forward": CALIBRATED, "gradient": CALIBRATED}, "privacy": {"record_epsilon": budget}}
    twins = twins_of("llama", (2, 1), sections=sections)
    boundary = twins.boundary
    trainer = trainer_of(twins.split, tmp_path)
    trainer.train_dataset = rows()[:6] * 2
    with pytest.raises(BudgetExhausted) as caught:
        trainer.train()
    assert "remove the rows of these records" in caught.value.remedy
    charges = Counter(charge.record for one in boundary.ledger.history() for charge in one.charges)
    assert 0 < boundary.budget.epsilon <= budget * (1 + 1e-9)
    left = [row for row, _ in rows() if all(boundary.affordable([row], [len(row)]))]
    assert len(left) == len(rows()) - len(charges)
