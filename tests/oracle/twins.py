"""Twins: a split model, and the uncut transformers model with the same adapters through plain peft.

The uncut one is the oracle: whatever the split model computes, it must compute too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from isthmus.data.tokens import IGNORED, Batch, positions
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Part
from isthmus.model.split import SplitForCausalLM
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.join import greeting, join
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.rounds_client import RoundsClient
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import Channel, LoopbackChannel
from tests.conftest import VOCABULARY, save_tiny_model, uncut

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma2")
CUTS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1))
"""All cuts of five blocks that leave at least one to each part."""

Tensors = dict[str, torch.Tensor]
Inputs = dict[str, torch.Tensor]
Connect = Callable[[TrunkService, str, Recipe], Channel]


def save_vivid_model(family: str, folder: Path, **config: Any) -> Path:
    """A tiny model in which everything matters: large weights, and norms and biases that are not all ones and zeros.

    With a fresh model's small weights, attention is all but uniform, and a wrong position or window would pass.
    """
    save_tiny_model(family, folder, initializer_range=0.3, **config)
    model = uncut(folder)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor += torch.randn(tensor.shape, generator=draw)
    model.save_pretrained(folder)
    return folder


def loopback(service: TrunkService, name: str, recipe: Recipe) -> Channel:
    own = recipe.of_silo(name, ranked=False)
    return LoopbackChannel(service, name, greeting=greeting(Checkpoint(recipe.model.path), own))


@dataclass(frozen=True)
class Twins:
    split: SplitForCausalLM
    whole: PeftModel
    service: TrunkService

    @property
    def remote(self) -> RemoteTrunk:
        assert isinstance(self.split.trunk, RemoteTrunk)
        return self.split.trunk

    @property
    def rounds(self) -> RoundsClient:
        return self.remote.rounds

    @property
    def boundary(self) -> Boundary:
        assert isinstance(self.split.boundary, Boundary)
        return self.split.boundary

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.split.bottom, self.service._runner.part, self.split.top

    @property
    def both(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return self.split, self.whole

    def split_adapter(self) -> Tensors:
        return {name: tensor for part in self.parts for name, tensor in adapters.adapter_of(part).items()}

    def split_gradients(self) -> Tensors:
        """Of bottom and top as autograd left them, of the trunk as its service keeps them until the next step."""
        training = self.service._training
        found = {name: tensor.grad for part in self.split.ends for name, tensor in adapters.trainable(part).items()}
        names = adapters.trainable(self.service._runner.part)
        return found | dict(zip(names, training._silos["a"].gradients, strict=True))

    def close(self) -> None:
        self.remote.channel.close()
        self.service.stop()


def make_twins(
    recipe: Recipe, store: Path, *, connect: Connect = loopback, moved: bool = True, ends_train_a: bool = False
) -> Twins:
    """A split model of this recipe's silo ``a``, connected to a real service, and its uncut twin.

    Args:
        store: the trunk's folder.
        moved: give every B random values, as if training had been; otherwise they are zero.
        ends_train_a: make A trainable in bottom and top; otherwise only the trunk trains A.
    """
    service = TrunkService(recipe, RoleDirectory(store))
    split = join(recipe, "a", channel=connect(service, "a", recipe), ledger=MemoryLedger()).model
    twins = Twins(split, with_lora(uncut(Path(recipe.model.path), getattr(torch, recipe.model.dtype)), recipe), service)
    tensors = twins.split_adapter()
    if moved:
        tensors |= random_b(tensors)
    for part in twins.parts:
        adapters.load_adapter(part, tensors)
    load_lora(twins.whole, {name: one for name, one in tensors.items() if "lora_" in name})
    for part in split.ends:
        for name, parameter in part.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(ends_train_a)
    if not ends_train_a:
        ends = adapters.adapter_of(split.bottom) | adapters.adapter_of(split.top)
        freeze_a(twins.whole, [name for name in ends if "lora_" in name])
    return twins


def with_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The uncut model with plain peft's adapters."""
    lora = recipe.lora
    frozen = "|".join(str(block) for block in range(recipe.model.bottom))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules="all-linear" if lora.all_linear else list(lora.targets),
        exclude_modules=rf".*\.layers\.({frozen})\..*" if lora.freeze_bottom else None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers
        return get_peft_model(model, config).eval()


def lora_of(whole: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The uncut model's adapter parameters by their names in a saved PEFT folder, less peft's prefix."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in whole.named_parameters()
        if "lora_" in name
    }


@torch.no_grad()
def load_lora(whole: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    own = lora_of(whole)
    assert own.keys() == tensors.keys()
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def freeze_a(whole: PeftModel, names: Iterable[str]) -> None:
    """Train only B in the layers of these adapter tensors."""
    own = lora_of(whole)
    for name in names:
        own[name].requires_grad_("lora_A" not in name)


def random_b(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    draw = torch.Generator().manual_seed(11)
    return {
        name: 0.3 * torch.randn(tensors[name].shape, generator=draw) for name in sorted(tensors) if "lora_B" in name
    }


def padded(rows: list[tuple[list[int], list[int]]], side: str) -> Inputs:
    """Rows of ids and labels as one batch, padded on the ``left`` (then with position ids) or on the ``right``."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for row, (ids, labels) in enumerate(rows):
        place = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        batch["input_ids"][row, place] = torch.tensor(ids)
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.tensor(labels)
    if side == "left":
        batch["position_ids"] = positions(batch["attention_mask"])
    return batch


def ragged(side: str, seed: int = 0, lengths: tuple[int, ...] = (3, 40, 23)) -> Inputs:
    """Random rows of these lengths, some beyond the sliding windows of 16; every token but the first has a label."""
    draw = torch.Generator().manual_seed(seed)
    texts = [torch.randint(4, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return padded([(ids, [IGNORED, *ids[1:]]) for ids in texts], side)


def batch_of(rows: Inputs) -> Batch:
    """The same rows as the silo's own training takes them."""
    targets = torch.cat([rows["labels"][:, 1:], torch.full((len(rows["labels"]), 1), IGNORED)], dim=1)
    return Batch(
        rows["input_ids"],
        rows["attention_mask"],
        rows["position_ids"],
        targets,
        torch.zeros(len(targets), dtype=torch.long),
    )


def prompts(lengths: tuple[int, ...] = (3, 40, 23), seed: int = 0) -> Inputs:
    """Random prompts for ``generate``."""
    batch = ragged("left", seed, lengths)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """The same names, and tensors within ``tolerance`` of one another relative to their largest value."""
    assert actual.keys() == expected.keys()
    far = {name: distance(actual[name], expected[name]) for name in expected}
    assert {name: value for name, value in far.items() if not value <= tolerance} == {}
