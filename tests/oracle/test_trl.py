"""TRL's trainers, as they come, train the split model as they train the uncut one with peft's adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from isthmus.errors import NotSupportedError
from isthmus.silo.join import load_tokenizer
from tests.oracle.conftest import BuildTwins
from tests.oracle.twins import Twins

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 2
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}w5 {% generation %}{{ message.content }} w6 "
    "{% endgeneration %}{% else %}w4 {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w5 {% endif %}"
)
Build = Callable[[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]], Trainer]


def words(seed: int, count: int) -> str:
    return " ".join(f"w{10 + (7 * seed + 3 * number) % 80}" for number in range(count))


def rows(make: Callable[[int], dict[str, Any]]) -> Dataset:
    return Dataset.from_list([make(number) for number in range(2 * STEPS)])


def text(number: int) -> dict[str, Any]:
    return {"text": words(number, 6 + 5 * number)}


def prompt_completion(number: int) -> dict[str, Any]:
    return {"prompt": words(number, 4 + number) + " ", "completion": words(number + 1, 3 + number)}


def chat(number: int) -> dict[str, Any]:
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": words(number + i, 3 + number + i)} for i, role in enumerate(roles)]}


def preference(number: int) -> dict[str, Any]:
    prompt, chosen, rejected = (words(number + shift, 3 + number) for shift in range(3))
    return {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected}


def prompt(number: int) -> dict[str, Any]:
    return {"prompt": words(number, 5 - number % 2)}


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A reward: the share of different words."""
    return [len(set(one.split())) / max(1, len(one.split())) for one in completions]


def sft(make: Callable[[int], dict[str, Any]], **settings: Any) -> Build:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]) -> Trainer:
        data = rows(make)
        return SFTTrainer(
            model, SFTConfig(**shared | settings), train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )

    return build


def dpo(**settings: Any) -> Build:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]) -> Trainer:
        data = rows(preference)
        return DPOTrainer(model, args=DPOConfig(**shared | settings), train_dataset=data, processing_class=tokenizer)

    return build


def grpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]) -> Trainer:
    settings = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
    return GRPOTrainer(
        model, distinct, GRPOConfig(**shared | settings), train_dataset=rows(prompt), processing_class=tokenizer
    )


TRAINERS: dict[str, Build] = {
    "text": sft(text),
    "prompt-completion": sft(prompt_completion),
    "chat": sft(chat),
    "assistant-only": sft(chat, assistant_only_loss=True, gradient_accumulation_steps=2),
    "packing": sft(text, packing=True, max_length=32),
    "padding-free": sft(text, padding_free=True, max_length=None),
    "dft": sft(text, loss_type="dft"),
    "dpo": dpo(),
    "dpo-precomputed": dpo(precompute_ref_log_probs=True),
    "grpo": grpo,
}


@pytest.fixture
def twins(twins_of: BuildTwins) -> Twins:
    return twins_of("llama", (2, 1), moved=False, ends_train_a=True)  # peft unfreezes A where TRL changes adapters


def logged(trainer: Trainer) -> list[float]:
    names = ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "rewards/margins", "reward", "kl")
    return [line[name] for line in trainer.state.log_history for name in names if name in line]


def losses(build: Build, twins: Twins, tmp_path: Path, **settings: Any) -> tuple[list[float], list[float]]:
    """What training logs of the split and of the uncut model."""
    found = []
    for name, model in zip(("split", "whole"), twins.both, strict=True):
        tokenizer = load_tokenizer(Path(twins.split.config._name_or_path))
        tokenizer.chat_template = TEMPLATE
        shared = {
            "output_dir": str(tmp_path / name),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = build(model, tokenizer, shared | settings)
        assert trainer.args.activation_checkpointing
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        found.append(logged(trainer))
    assert len(found[1]) >= 2 * STEPS
    assert twins.service._training._adapter._version >= STEPS
    return found[0], found[1]


@pytest.mark.parametrize("kind", TRAINERS)
def test_losses_are_the_uncut_models(kind: str, twins: Twins, tmp_path: Path) -> None:
    split, whole = losses(TRAINERS[kind], twins, tmp_path)
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_mixed_precision_is_the_silos_alone(twins: Twins, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As TRL comes, with bf16: the trunk computes in its own type, and a warning says so once."""
    split, whole = losses(sft(text), twins, tmp_path, bf16=True)
    assert split[0] == pytest.approx(whole[0], rel=0.01)
    assert sum("mixed precision" in message for message in caplog.messages) == 1


def test_a_mixture_trains_without_the_loss_of_its_routers(twins_of: BuildTwins, tmp_path: Path) -> None:
    """TRL adds a balancing loss over the routers of all blocks, unless its coefficient is 0."""
    twins = twins_of("qwen3_moe", (2, 1), moved=False, ends_train_a=True)
    with pytest.raises(NotSupportedError, match="output_router_logits") as caught:
        losses(sft(text), twins, tmp_path)
    assert "router_aux_loss_coef=0.0" in caught.value.remedy
    split, whole = losses(sft(text, router_aux_loss_coef=0.0), twins, tmp_path)
    assert split == pytest.approx(whole, rel=1e-5, abs=1e-6)
