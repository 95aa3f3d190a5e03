"""The stored tensors that a model's tensors are made of, by transformers' own rules for checkpoints.

A folder may hold tensors under other names (``language_model.model.layers…``) or in pieces (one tensor for each expert
of a mixture, which the model keeps as one); transformers renames and joins them when it loads a model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from isthmus.errors import ModelError
from isthmus.model.checkpoint import Checkpoint


class StoredTensors:
    """The tensors of a folder, by their names in the uncut model.

    Args:
        uncut: the uncut model on the ``meta`` device.
    """

    def __init__(self, checkpoint: Checkpoint, uncut: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._uncut = uncut
        self._pieces: dict[str, list[tuple[str, str]]] = {}
        """The pattern and the stored name of each piece of a tensor that is made of several."""
        self._names: dict[str, str] = {}
        """The stored name of each other tensor."""
        transforms = get_model_conversion_mapping(uncut)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._locate(checkpoint.weights)

    @property
    def tied(self) -> bool:
        """Whether the configuration of the uncut model ties its head to its embedding."""
        return bool(self._uncut.config.tie_word_embeddings)

    def sources(self, name: str) -> list[str]:
        """The stored tensors that this tensor of the uncut model is made of. A missing one is its own source."""
        if name in self._pieces:
            return [stored for _, stored in self._pieces[name]]
        return [self._names.get(name, name)]

    def unused(self, used: Collection[str]) -> list[str]:
        """All tensors that the folder holds but ``used``, by their names in the uncut model or names alike."""
        return [name for name in (*self._pieces, *self._names) if name not in used]

    def __contains__(self, name: str) -> bool:
        return name in self._pieces or name in self._names

    def read(self, name: str) -> torch.Tensor:
        """This tensor of the uncut model, on the CPU.

        Raises:
            ModelError: the folder lacks it, or its pieces do not fit together.
        """
        tensors = self._checkpoint.read(self.sources(name))
        if name not in self._pieces:
            return tensors[self._names.get(name, name)]
        converter = copy.deepcopy(self._converter(self._pieces[name][0][0]))
        for pattern, stored in self._pieces[name]:
            converter.add_tensor(name, stored, pattern, tensors[stored])
        try:
            made = converter.convert(name, model=self._uncut, config=self._uncut.config)[name]
        except (RuntimeError, LookupError, ValueError) as error:
            raise ModelError(
                f"the pieces of {name} in {self._checkpoint.folder} do not fit together: {error}",
                remedy="give model.path a complete model folder",
            ) from error
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def _locate(self, stored: Iterable[str]) -> None:
        """Map every stored tensor to the tensors of the uncut model that it is a part of."""
        expected, prefix = self._uncut.state_dict(), self._uncut.base_model_prefix
        for own in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(own, self._renamings, self._converters, prefix, expected)
            if name not in expected and own in expected:
                name, pattern = own, None
            if pattern is None:
                if self._names.setdefault(name, own) != own:
                    raise ModelError(
                        f"{self._checkpoint.folder} holds {name} twice, as {self._names[name]} and as {own}",
                        remedy="take one of them out of the files",
                    )
                continue
            first, *others = self._converter(pattern).target_patterns
            for target in (first, *others):
                self._pieces.setdefault(name.replace(first, target), []).append((pattern, own))

    def _converter(self, pattern: str) -> WeightConverter:
        """The converter of this source pattern."""
        return next(one for one in self._converters if pattern in one.source_patterns)
