"""The model families isthmus can cut, and where each keeps its pieces. A new family is a row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from isthmus.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Attribute names of a causal language model of this family."""

    backbone: str = "model"
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"

    def block_prefix(self) -> str:
        """What the name of a block's tensor starts with, up to the block's number."""
        return f"{self.backbone}.{self.blocks}."

    def backbone_of(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.backbone)

    def embedding_of(self, model: nn.Module) -> nn.Module:
        return self.backbone_of(model).get_submodule(self.embedding)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(),
    "olmo2": Family(),
    "gemma2": Family(),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of this configuration's ``model_type``.

    Raises:
        ModelError: no such row.
    """
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"models of type {config.model_type!r} cannot be cut yet", remedy=f"use one of: {known}"
        ) from None
