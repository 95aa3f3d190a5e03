"""The split model without its head, which transformers and its libraries call ``base_model``.

Shapes: B rows, L new positions, D the model's width.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from isthmus.model.cut import Part


class HiddenStates(Protocol):
    """A split model, as its backbone calls it."""

    @property
    def ends(self) -> tuple[Part, Part]:
        """Bottom and top."""
        ...

    def last_hidden(self, **inputs: Any) -> BaseModelOutputWithPast:
        """The normed output of the last block."""
        ...


class SplitBackbone(nn.Module):
    """The embedding, all blocks and the last norm of a split model: ``model.base_model``, ``model.get_decoder()``.

    Its parameters are the silo's: those of bottom and of top without the head. The split model does not own it, so that
    no parameter has two names there.
    """

    def __init__(self, model: HiddenStates) -> None:
        super().__init__()
        self.bottom, self.top = (part.family.backbone_of(part.model) for part in model.ends)
        self.__dict__["_model"] = model

    def forward(self, *args: Any, **inputs: Any) -> BaseModelOutputWithPast:
        """The last hidden states ``[B, L, D]``, and the cache if there is one; arguments as of the uncut backbone.

        Raises:
            NotSupportedError: an argument, or ``boundary.tail``, does not allow it.
        """
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
        model: HiddenStates = self.__dict__["_model"]
        return model.last_hidden(**dict(zip(names, args, strict=False)), **inputs)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, in bottom."""
        model: HiddenStates = self.__dict__["_model"]
        bottom, _ = model.ends
        return bottom.family.embedding_of(bottom.model)
