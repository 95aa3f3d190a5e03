"""transformers' methods for adapters, on a split model: each does what it does on the uncut model, or is refused.

A split model has one adapter, which the recipe describes. Bottom's and top's part is the silo's, the trunk's part is
served by another party, for all silos. So a silo may load its ends, but not add, remove, disable or merge anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from isthmus.errors import NotSupportedError
from isthmus.model import adapters
from isthmus.model.cut import Part
from isthmus.model.peft_folder import PeftFolder

_IN_RECIPE = "describe the adapter in the recipe's [lora]; to start from one, set lora.start on every party"
_EXPORTED = "write the adapter with 'isthmus export', and use the folder with the uncut model"


class OnlyAdapter(dict[str, Any]):
    """The configuration of the one adapter, by its name. peft adds an adapter by setting its own here first."""

    def __setitem__(self, name: str, config: Any) -> NoReturn:
        raise NotSupportedError(
            f"the split model has one adapter, and {name!r} would be another: the trunk's part is served by another "
            "party",
            remedy=_IN_RECIPE,
        )

    def update(self, *configs: Any, **named: Any) -> NoReturn:
        self.__setitem__(", ".join(dict(*configs, **named)), None)


class AdapterMethods:
    """The methods, for a model with ``ends`` of its own."""

    ends: tuple[Part, Part]

    @property
    def peft_config(self) -> OnlyAdapter:
        """The adapter's configuration by its name, as on a transformers model with an adapter."""
        configs = [part.model.peft_config for part in self.ends if hasattr(part.model, "peft_config")]
        return OnlyAdapter(configs[-1] if configs else {})

    def load_adapter(
        self,
        peft_model_id: str | Path | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, torch.Tensor] | None = None,
        is_trainable: bool = False,
        **settings: Any,
    ) -> None:
        """Load bottom's and top's tensors from a PEFT folder, such as ``save_pretrained`` writes, in place of theirs.

        Args:
            peft_model_id: the folder.
            adapter_name: None or "default".
            is_trainable: whether the loaded adapter trains on; otherwise it is frozen, as in transformers.
            settings: ``low_cpu_mem_usage``, ``local_files_only`` and ``hotswap`` change nothing; others are refused.

        Raises:
            ModelError: the folder cannot be read, or its rank, scale, layers or shapes are others.
            NotSupportedError: the folder has the trunk's tensors too, or is no plain LoRA adapter.
        """
        self._check_name(adapter_name)
        self._refuse_settings(
            {"peft_config": peft_config, "adapter_state_dict": adapter_state_dict}
            | {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}
        )
        if peft_model_id is None:
            raise NotSupportedError("load_adapter got no folder", remedy="give it the folder of a PEFT adapter")
        lora = adapters.lora_of(self.ends)
        if lora is None:
            raise NotSupportedError("this model's ends have no adapter", remedy=_IN_RECIPE)
        folder = PeftFolder.read(Path(peft_model_id))
        own = {name: one for part in self.ends for name, one in adapters.adapter_parameters(part).items()}
        if others := folder.tensors.keys() - own.keys():
            raise NotSupportedError(
                f"the adapter in {folder.path} has {min(others)} and {len(others) - 1} more tensors of layers that are "
                "not the silo's: the trunk is served by another party",
                remedy=f"load a folder that this model's save_pretrained wrote, or {_IN_RECIPE.partition('; ')[2]}",
            )
        folder.check_scale(lora)
        folder.check_tensors({name: tuple(one.shape) for name, one in own.items()})
        for part in self.ends:
            adapters.load_adapter(part, folder.tensors)
        if not is_trainable:
            model: Any = self
            for one in (*own.values(), *model.trunk.parameters()):  # the trunk's stands for its adapter
                one.requires_grad_(False)
            model.eval()

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Bottom's and top's tensors by their names in the uncut model."""
        self._check_name(adapter_name)
        self._refuse_settings({"state_dict": state_dict})
        return {name: one for part in self.ends for name, one in adapters.adapter_of(part).items()}

    def active_adapters(self) -> list[str]:
        """The adapter's name."""
        return list(self.peft_config)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Choose the one adapter."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._check_name(name)

    def enable_adapters(self) -> None:
        """Nothing: the adapter is always enabled."""

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> NoReturn:
        """Refused."""
        self._refuse("add_adapter", _IN_RECIPE)

    def disable_adapters(self) -> NoReturn:
        """Refused."""
        self._refuse("disable_adapters", "use the uncut base model, or a recipe and a trunk that have not trained")

    def delete_adapter(self, adapter_names: list[str] | str) -> NoReturn:
        """Refused."""
        self._refuse("delete_adapter", "use the uncut base model, or a recipe and a trunk that have not trained")

    def enable_peft_hotswap(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        self._refuse("enable_peft_hotswap", "leave the call out: load_adapter replaces the ends' tensors in place")

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        self._refuse("merge_and_unload", _EXPORTED)

    def merge_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        self._refuse("merge_adapter", _EXPORTED)

    def unmerge_adapter(self) -> NoReturn:
        """Refused."""
        self._refuse("unmerge_adapter", _EXPORTED)

    def unload(self) -> NoReturn:
        """Refused."""
        self._refuse("unload", "use the uncut base model")

    def _check_name(self, name: str | None) -> None:
        if name not in (None, adapters.ADAPTER):
            raise NotSupportedError(
                f"the split model has no adapter {name!r}, its one adapter is {adapters.ADAPTER!r}",
                remedy=f"leave the name out, or give {adapters.ADAPTER!r}",
            )

    def _refuse(self, method: str, remedy: str) -> NoReturn:
        raise NotSupportedError(
            f"{method} would have to change the trunk's adapter, which another party serves for all silos",
            remedy=remedy,
        )

    def _refuse_settings(self, settings: Mapping[str, Any]) -> None:
        given = sorted(key for key, value in settings.items() if value is not None)
        if given:
            raise NotSupportedError(
                f"adapters of the split model do not take {', '.join(given)}",
                remedy=f"leave {', '.join(given)} out; save the adapter to a folder first",
            )


_WITHOUT_EFFECT = {"low_cpu_mem_usage", "local_files_only", "hotswap"}
