"""The ``Trainer`` of transformers, with gradient accumulation, trains the split model as it trains the uncut one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from isthmus.errors import BudgetExhausted
from isthmus.model import adapters
from isthmus.privacy.accountant import Account
from isthmus.silo.callback import TrunkStepCallback
from tests.conftest import VOCABULARY
from tests.features.silo.test_spent_budgets import CALIBRATED, COST, DELTA
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Twins, assert_same, distance, lora_of, padded

STEPS, ACCUMULATED, BATCH, RATE = 3, 2, 2, 0.05
Row = tuple[list[int], list[int]]


@pytest.fixture
def twins(twins_of: BuildTwins) -> Twins:
    train = {"optimizer": "sgd", "learning_rate": RATE, "steps": STEPS}
    return twins_of("llama", (2, 1), sections={"train": train})


def rows(seed: int = 0) -> list[Row]:
    """Rows of unlike length, of which unlike shares have labels, first tokens too (which no loss counts)."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(STEPS * ACCUMULATED * BATCH):
        ids = torch.randint(4, VOCABULARY, (5 + 3 * number,), generator=draw).tolist()
        hidden = number % 4 * 2
        found.append((ids, [-100] * hidden + ids[hidden:]))
    return found


def trainer_of(model: PreTrainedModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return Trainer(
        model,
        arguments,
        data_collator=lambda batch: padded(batch, "right"),
        train_dataset=rows(),
        eval_dataset=rows(1),
        callbacks=list(callbacks),
    )


def test_trainer_gives_the_adapters_it_gives_the_uncut_model(twins: Twins, tmp_path: Path) -> None:
    before = twins.split_adapter()
    split = trainer_of(twins.split, tmp_path, TrunkStepCallback(twins.rounds, ["a"]))
    whole = trainer_of(twins.whole, tmp_path)
    for trainer in (split, whole):
        trainer.train()
    after = twins.split_adapter()
    assert_same(after, {name: tensor.detach() for name, tensor in lora_of(twins.whole).items()}, 1e-5)
    moved = {name for name in after if distance(after[name], before[name]) > 1e-3}
    assert moved == {name for name, parameter in lora_of(twins.whole).items() if parameter.requires_grad}
    assert distance(*(torch.tensor(trainer.evaluate()["eval_loss"]) for trainer in (split, whole))) <= 1e-5


def test_trunk_saves_the_round_that_the_trainer_ends(twins: Twins, tmp_path: Path) -> None:
    trainer_of(twins.split, tmp_path, TrunkStepCallback(twins.rounds, ["a"])).train()
    saved = twins.service._training._store.load_round(1)["adapter"]
    assert_same(saved, adapters.adapter_of(twins.parts[1]), 0.0)


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


def test_a_spent_record_ends_training_within_its_budget_and_can_be_told_before(
    twins_of: BuildTwins, tmp_path: Path
) -> None:
    """Each row's budget bears one step, and half of the rows come twice."""
    budget = Account(2 * COST).epsilon(DELTA).value
    sections = {"boundary": {"forward": CALIBRATED, "gradient": CALIBRATED}, "privacy": {"record_epsilon": budget}}
    twins = twins_of("llama", (2, 1), sections=sections)
    boundary = twins.boundary
    trainer = trainer_of(twins.split, tmp_path, TrunkStepCallback(twins.rounds, ["a"]))
    trainer.train_dataset = rows()[:6] * 2
    with pytest.raises(BudgetExhausted) as caught:
        trainer.train()
    assert "remove the rows of these records" in caught.value.remedy
    charges = Counter(charge.record for one in boundary.ledger.history() for charge in one.charges)
    assert 0 < boundary.budget.epsilon <= budget * (1 + 1e-9)
    left = [row for row, _ in rows() if all(boundary.affordable([row], [len(row)]))]
    assert len(left) == len(rows()) - len(charges)
