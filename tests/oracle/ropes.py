"""Rope kinds for tiny models, and plain parts and models that compute each sequence as if they had seen no other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.model.rope import SequenceRope
from tests.conftest import tiny_config
from tests.oracle.twins import save_vivid_model

SWITCH = 16
"""The length up to which frequencies stay as they are, for kinds that look at the length."""
OWN = "own"
BASE = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
SHORT, LONG = (1.0, 1.1, 1.2, 1.3), (1.5, 3.0, 6.0, 9.0)
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 8.0},
    "yarn": {"factor": 32.0, "original_max_position_embeddings": SWITCH},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [*SHORT],
        "long_factor": [*LONG],
        "original_max_position_embeddings": SWITCH,
    },
}
"""Parameters of each kind, for heads of 8."""


def save_roped_model(family: str, kind: str, folder: Path, **config: Any) -> Path:
    """A tiny model in which everything matters, with this kind of rope, or its family's ("own").

    Where layer types have their own, those with full attention get it.
    """
    if kind == OWN:
        return save_vivid_model(family, folder, **config)
    parameters = {"rope_type": kind, **BASE, **ROPES[kind]}
    by_layer = {name: one for name, one in tiny_config(family).rope_parameters.items() if isinstance(one, dict)}
    config["rope_parameters"] = {**by_layer, "full_attention": parameters} if by_layer else parameters
    if kind == "dynamic":
        config["max_position_embeddings"] = SWITCH
    if hasattr(tiny_config(family), "original_max_position_embeddings"):
        config["original_max_position_embeddings"] = SWITCH
    return save_vivid_model(family, folder, **config)


class FirstState:
    """Rotary embeddings of a plain transformers module, which change with every pass, in their first state.

    Args:
        module: what holds them; a ``SequenceRope`` in it becomes the plain module again.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        for name, one in list(module.named_modules()):
            if isinstance(one, SequenceRope):
                self._put(name, one.rope)
        ropes = {name: one for name, one in module.named_modules() if hasattr(one, "rope_type")}
        self._ropes = {name: copy.deepcopy(one) for name, one in ropes.items()}

    def restore(self) -> None:
        """As if the module had never run."""
        for name, one in self._ropes.items():
            self._put(name, copy.deepcopy(one))

    def _put(self, name: str, rope: nn.Module) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._module.get_submodule(owner), leaf, rope)
