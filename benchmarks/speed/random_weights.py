"""Models of a shape without a checkpoint: their weights are drawn where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from isthmus.model.checkpoint import Checkpoint
from isthmus.model.quantized import stored_weights

SPREAD = 0.02
"""Standard deviation of the weights, LLaMA's own at its start. What is one-dimensional is a norm's, and one."""


class RandomCheckpoint(Checkpoint):
    """Gives tensors as a model folder would, each drawn as it is read.

    Args:
        values: of the configuration, ``model_type`` among them.
        device: where the tensors are drawn.
    """

    def __init__(self, values: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.folder = Path("random weights")
        self.config = AutoConfig.for_model(**values)
        self.fingerprint = f"random {sorted(values.items())}"
        self.tensors_read = set()
        self._dtype = dtype
        self._device = device
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(self.config)
        self._shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
        self.weights = stored_weights(self._shapes, None, self.folder)

    def whole(self) -> PreTrainedModel:
        """The uncut model with weights of its own draw, which cost what these cost."""
        with self._device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=self._dtype)
        return model

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        self.tensors_read.update(names)
        return {name: self._drawn(self._shapes[name]) for name in names}

    def _drawn(self, shape: torch.Size) -> torch.Tensor:
        place = {"dtype": self._dtype, "device": self._device}
        return torch.ones(shape, **place) if len(shape) == 1 else torch.randn(shape, **place) * SPREAD
