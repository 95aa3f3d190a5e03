"""What follows from a view: the models that its adversary can run, and what its own rows teach about the boundary.

Shapes: T tokens, L vectors of one sequence, D width of what crosses, E width of the model, V vocabulary.
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
from isthmus.attacks.view.view import Pair, View
from isthmus.model import adapters, bottleneck
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, PartName, load_part
from isthmus.model.device import CPU

CALIBRATION = 128
"""Rows of the adversary's own that tell how what arrives differs from what bottom gives."""


@dataclass(frozen=True, eq=False)
class Tail:
    """What the boundary makes of bottom's result, as far as it is no noise: clipping, or any affine map.

    The affine map is the bottleneck that the recipe names, as far as the adversary knows its weights, or stands for
    whatever linear layer there may be: it is then read off the adversary's own rows.
    """

    clip: float
    weight_ED: torch.Tensor | None
    bias_D: torch.Tensor | None
    variance: float = 0.0
    """Median squared difference of a coordinate from what really arrived: noise, rounding, wrong adapters."""
    mean: float = 0.0
    """Mean squared difference."""

    def __call__(self, h_TE: torch.Tensor) -> torch.Tensor:
        h_TE = h_TE.float()
        if self.weight_ED is not None and self.bias_D is not None:
            h_TE = h_TE @ self.weight_ED + self.bias_D
        if self.clip:
            h_TE = h_TE * (self.clip / h_TE.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
        return h_TE


class Knowledge:
    """Models and estimates, each made when it is first asked for.

    Args:
        references: models that it may train of its own, to compare the final one with.
        device: where they are. An attack makes its tensors on torch's default device, which must be this one then.

    Raises:
        ModelError: the public model's folder is unusable.
    """

    def __init__(self, view: View, references: int = 0, device: torch.device = CPU) -> None:
        self.view, self.references, self._device = view.to(device), references, device
        self._checkpoint = Checkpoint(str(view.folder))

    @cached_property
    def cut(self) -> Cut:
        return Cut(self.view.recipe.model.bottom, self.view.recipe.model.top)

    @cached_property
    def bottom(self) -> Part:
        """The silo's bottom, with its adapter if the adversary knows it, else the public model's."""
        recipe = self.view.recipe
        part = self._loaded("bottom", getattr(torch, recipe.model.dtype))
        adapters.add_adapter(part, recipe.lora, recipe.seed, freeze_a=True)
        adapters.load_adapter(part, self.view.adapters)
        return part.requires_grad_(False).eval()

    @cached_property
    def narrowing(self) -> torch.Tensor | None:
        """The silo's bottleneck behind bottom, ``[E, D]``, likewise; the public start where its adapter is unknown."""
        if self.view.recipe.boundary.width is None:
            return None
        weight_DE = bottleneck.tensor_of(self.equipped("bottom"), bottleneck.DOWN)
        return None if weight_DE is None else weight_DE.detach().float().T

    @cached_property
    def top(self) -> Part:
        """The silo's top, likewise, in fp32."""
        return self.equipped("top").requires_grad_(False)

    @cached_property
    def trunk(self) -> Part:
        """The trunk, likewise, in fp32."""
        return self.equipped("trunk").requires_grad_(False)

    def equipped(self, name: PartName) -> Part:
        """A part, in fp32, with all that the recipe has it learn, as far as this adversary knows that."""
        part = self._loaded(name)
        adapters.equip(part, self.view.recipe)
        adapters.load_adapter(part, {**self.view.adapters, **self.view.trunk_adapter})
        return part.eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The public one."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.view.folder)
        return tokenizer

    @cached_property
    def template(self) -> Template:
        """What the recipe tells of every row that bottom reads."""
        whole = template_of(self.view.recipe.task, self.tokenizer)
        trained = all(crossing.kind == "train" for crossing in self.view.crossings)
        return whole if trained else Template(whole.before)

    @property
    def choices(self) -> list[list[int]]:
        """The tokens of each possible answer, which the recipe tells; none for free text."""
        return [self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in self.view.recipe.task.choices]

    @property
    def ending(self) -> int | None:
        """The token that closes every answer, if answers are free text."""
        return None if self.view.recipe.task.choices else self.tokenizer.eos_token_id

    @cached_property
    def language_model(self) -> Any:
        """The public base model, uncut."""
        return public_model(self.view.folder).to(self._device)

    @cached_property
    def embedding(self) -> torch.Tensor:
        """The public one, ``[V, E]``."""
        part = self.bottom
        module = part.family.backbone_of(part.model).get_submodule(part.family.embedding)
        return module.get_parameter("weight").detach().float()

    @cached_property
    def linear(self) -> LinearInverter:
        """Fitted to the adversary's own rows."""
        z_TD, tokens_T = aligned(self.view.needs("pairs").pairs)
        return LinearInverter.fit(z_TD, tokens_T, self.embedding)

    @cached_property
    def tail(self) -> Tail:
        """Measured on the adversary's own rows."""
        return _measured_tail(self, self.view.needs("pairs").pairs[:CALIBRATION])

    @torch.no_grad()
    def bottom_of(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Bottom's result for a whole row, ``[L, E]``."""
        ids_BL = torch.tensor([tokens])
        return self.bottom.hidden(input_ids=ids_BL, use_cache=False)[0].float()

    def _loaded(self, name: PartName, dtype: torch.dtype = torch.float32) -> Part:
        return load_part(self._checkpoint, self.cut, name, dtype=dtype, device=self._device)


def public_model(folder: Path) -> Any:
    """The whole base model, in fp32, to be read only."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


def aligned(pairs: tuple[Pair, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """All vectors of these rows and the token each stands at: where only the last k crossed, the last k tokens."""
    z_TD = torch.cat([pair.crossing.hidden_LD.float() for pair in pairs])
    tokens = [token for pair in pairs for token in pair.tokens[len(pair.tokens) - pair.crossing.length :]]
    return z_TD, torch.tensor(tokens)


def _measured_tail(knowledge: Knowledge, pairs: tuple[Pair, ...]) -> Tail:
    """The simplest map that explains the second half of the rows as well as any, given the first."""
    h_TE = torch.cat([knowledge.bottom_of(pair.tokens)[-pair.crossing.length :] for pair in pairs])
    z_TD, _ = aligned(pairs)
    half = len(z_TD) // 2
    clip = knowledge.view.recipe.boundary.forward.clip
    weight, bias = ridge(h_TE[:half], z_TD[:half])
    choices = [Tail(clip, weight, bias)]
    if knowledge.narrowing is not None and knowledge.narrowing.shape[1] == z_TD.shape[1]:
        choices.insert(0, Tail(clip, knowledge.narrowing, torch.zeros(z_TD.shape[1])))
    if h_TE.shape[1] == z_TD.shape[1]:
        choices.insert(0, Tail(clip, None, None))

    def errors(tail: Tail) -> torch.Tensor:
        return (tail(h_TE[half:]) - z_TD[half:]).square().mean(dim=1)

    best = min(choices, key=lambda tail: float(errors(tail).median()) * (1.02 if tail is choices[-1] else 1.0))
    return replace(best, variance=float(errors(best).median()), mean=float(errors(best).mean()))
