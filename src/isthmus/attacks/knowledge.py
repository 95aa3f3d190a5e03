"""The knowledge of an adversary: models that it can run, and estimates of the boundary from its own rows.

Shapes: T tokens, L vectors of one sequence, D width of a crossing vector, E width of the model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from isthmus.attacks.inversion.linear import LinearInverter, ridge
from isthmus.attacks.template import Template, template_of
from isthmus.attacks.view.view import KnownPair, View
from isthmus.data.tokens import choice_tokens
from isthmus.model import adapters, bottleneck
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, PartName, load_part
from isthmus.model.device import CPU

CALIBRATION = 128
"""Own rows from which the map from bottom's result to the crossing is estimated."""


@dataclass(frozen=True, eq=False)
class BoundaryMap:
    """The noiseless map from bottom's result to the vector that crosses: an affine map, then clipping.

    The affine map is the recipe's bottleneck, if the adversary knows its weights; otherwise it is fitted to the
    adversary's own rows, so that it covers any linear layer.
    """

    clip: float
    """Largest norm of a vector; 0: no clipping."""
    weight_ED: torch.Tensor | None
    """None: no affine map."""
    bias_D: torch.Tensor | None
    variance: float = 0.0
    """Median over own vectors of the mean squared error per coordinate: noise, rounding, unknown adapters."""
    mean: float = 0.0
    """Mean over own vectors of the mean squared error per coordinate."""

    def __call__(self, h_TE: torch.Tensor) -> torch.Tensor:
        """The crossing vectors without noise, ``[T, D]``, for bottom's result."""
        h_TE = h_TE.float()
        if self.weight_ED is not None and self.bias_D is not None:
            h_TE = h_TE @ self.weight_ED + self.bias_D
        if self.clip:
            h_TE = h_TE * (self.clip / h_TE.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
        return h_TE


class Knowledge:
    """Models and estimates of one adversary, each computed on first use.

    Args:
        references: number of reference models that the adversary trains for membership inference.
        device: device of the models. Attacks create tensors on torch's default device, which must be this device.

    Raises:
        ModelError: the public model's folder is unusable.
    """

    def __init__(self, view: View, references: int = 0, device: torch.device = CPU) -> None:
        self.view, self.references, self.device = view.to(device), references, device
        self._checkpoint = Checkpoint(str(view.folder))

    @cached_property
    def cut(self) -> Cut:
        """The recipe's cut."""
        return Cut(self.view.recipe.model.bottom, self.view.recipe.model.top)

    @cached_property
    def bottom(self) -> Part:
        """Bottom in the recipe's dtype, with the silo's adapter if the adversary knows it, else the initial one."""
        recipe = self.view.recipe
        part = self._loaded("bottom", getattr(torch, recipe.model.dtype))
        adapters.add_adapter(part, recipe.lora, recipe.seed, freeze_a=True)
        adapters.load_adapter(part, self.view.adapters)
        return part.requires_grad_(False).eval()

    @cached_property
    def narrowing(self) -> torch.Tensor | None:
        """The bottleneck's projection, ``[E, D]``, trained if the adversary knows the adapter, else its public initial
        value; None without ``boundary.width``."""
        if self.view.recipe.boundary.width is None:
            return None
        weight_DE = bottleneck.layer_weight(self.equipped("bottom"), bottleneck.DOWN)
        return None if weight_DE is None else weight_DE.detach().float().T

    @cached_property
    def top(self) -> Part:
        """Top in fp32, with the silo's adapter if the adversary knows it, else the initial one."""
        return self.equipped("top").requires_grad_(False)

    @cached_property
    def trunk(self) -> Part:
        """The trunk in fp32, with its adapter if the adversary knows it, else the initial one."""
        return self.equipped("trunk").requires_grad_(False)

    def equipped(self, name: PartName) -> Part:
        """A part in fp32 with all its trained tensors: those that the adversary knows, else their initial values."""
        part = self._loaded(name)
        adapters.add_trained_layers(part, self.view.recipe)
        adapters.load_adapter(part, {**self.view.adapters, **self.view.trunk_adapter})
        return part.eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The public model's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.view.folder)
        return tokenizer

    @cached_property
    def template(self) -> Template:
        """The recipe's prompt template in tokens; only its beginning if there are inference crossings, because answers
        follow the prompt there."""
        whole = template_of(self.view.recipe.task, self.tokenizer)
        trained = all(crossing.kind == "train" for crossing in self.view.crossings)
        return whole if trained else Template(whole.before)

    @property
    def choices(self) -> list[list[int]]:
        """The tokens of each possible answer, from the recipe; empty if answers are free text."""
        return choice_tokens(self.tokenizer, self.view.recipe.task.continuations)

    @property
    def ending(self) -> int | None:
        """The token that ends every answer, that of the end of text; None if answers are choices that need no end."""
        ends = {choice[-1] for choice in self.choices} or {self.tokenizer.eos_token_id}
        return self.tokenizer.eos_token_id if ends == {self.tokenizer.eos_token_id} else None

    @cached_property
    def language_model(self) -> Any:
        """The uncut public base model in fp32."""
        return public_model(self.view.folder).to(self.device)

    @cached_property
    def embedding(self) -> torch.Tensor:
        """The public model's embedding, ``[V, E]``, fp32."""
        part = self.bottom
        module = part.family.backbone_of(part.model).get_submodule(part.family.embedding)
        return module.get_parameter("weight").detach().float()

    @cached_property
    def linear(self) -> LinearInverter:
        """The linear inverter, fitted to the adversary's own rows."""
        z_TD, tokens_T = aligned(self.view.needs("pairs").pairs)
        return LinearInverter.fit(z_TD, tokens_T, self.embedding)

    @cached_property
    def boundary_map(self) -> BoundaryMap:
        """The boundary's map, estimated from the adversary's own rows."""
        return _fitted_map(self, self.view.needs("pairs").pairs[:CALIBRATION])

    @torch.no_grad()
    def bottom_of(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Bottom's result for a row of tokens, ``[L, E]``, fp32."""
        ids_BL = torch.tensor([tokens])
        return self.bottom.hidden(input_ids=ids_BL, use_cache=False)[0].float()

    def _loaded(self, name: PartName, dtype: torch.dtype = torch.float32) -> Part:
        return load_part(self._checkpoint, self.cut, name, dtype=dtype, device=self.device)


def public_model(folder: Path) -> Any:
    """The uncut base model in a folder, in fp32, in evaluation mode and without gradients."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


def aligned(pairs: tuple[KnownPair, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """All crossing vectors of these rows, ``[T, D]`` in fp32, and their tokens, ``[T]``.

    If only a row's last k vectors crossed, its last k tokens are taken.
    """
    z_TD = torch.cat([pair.crossing.hidden_LD.float() for pair in pairs])
    tokens = [token for pair in pairs for token in pair.tokens[len(pair.tokens) - pair.crossing.length :]]
    return z_TD, torch.tensor(tokens)


def _fitted_map(knowledge: Knowledge, pairs: tuple[KnownPair, ...]) -> BoundaryMap:
    """The map with the least error on the second half of the vectors: clipping alone, the recipe's bottleneck, or an
    affine map fitted to the first half, which must be 2 % better than the others."""
    h_TE = torch.cat([knowledge.bottom_of(pair.tokens)[-pair.crossing.length :] for pair in pairs])
    z_TD, _ = aligned(pairs)
    half = len(z_TD) // 2
    clip = knowledge.view.recipe.boundary.forward.clip
    weight, bias = ridge(h_TE[:half], z_TD[:half])
    choices = [BoundaryMap(clip, weight, bias)]
    if knowledge.narrowing is not None and knowledge.narrowing.shape[1] == z_TD.shape[1]:
        choices.insert(0, BoundaryMap(clip, knowledge.narrowing, torch.zeros(z_TD.shape[1])))
    if h_TE.shape[1] == z_TD.shape[1]:
        choices.insert(0, BoundaryMap(clip, None, None))

    def errors(boundary_map: BoundaryMap) -> torch.Tensor:
        return (boundary_map(h_TE[half:]) - z_TD[half:]).square().mean(dim=1)

    best = min(choices, key=lambda one: float(errors(one).median()) * (1.02 if one is choices[-1] else 1.0))
    return replace(best, variance=float(errors(best).median()), mean=float(errors(best).mean()))
