"""The whole model of an adversary: bottom, trunk and top joined in one process as the recipe joins them.

It includes ``boundary.tail``, the bottleneck, the residual path and clipping; noise is optional.

Shapes: L positions of one row (prompt and answer), N of the answer, K that cross, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from isthmus.attacks.gradients.lens import clipped
from isthmus.attacks.gradients.top_input import path_noise
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import TokenRow
from isthmus.model import adapters
from isthmus.model.bottleneck import DOWN, GATE, UP, layer_weight, project
from isthmus.model.crossing import IGNORED
from isthmus.model.cut import Part, PartName

PART_NAMES: tuple[PartName, PartName, PartName] = ("bottom", "trunk", "top")


class WholeModel(nn.Module):
    """Bottom, trunk and top as one module.

    Args:
        knowledge: gives the parts, with the adapters that the adversary knows, else the initial ones.
        noisy: add the recipe's noise to what crosses, from torch's global generator.
    """

    def __init__(self, knowledge: Knowledge, *, noisy: bool = False) -> None:
        super().__init__()
        self._boundary, self._noisy = knowledge.view.recipe.boundary, noisy
        self.bottom, self.trunk, self.top = map(knowledge.equipped, PART_NAMES)
        self._down = layer_weight(self.bottom, DOWN)
        self._up, self._gate_D = layer_weight(self.trunk, UP), layer_weight(self.top, GATE)

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """Bottom, trunk and top."""
        return self.bottom, self.trunk, self.top

    def adapter(self) -> dict[str, nn.Parameter]:
        """The trainable tensors of all parts, by uncut name."""
        return {name: one for part in self.parts for name, one in adapters.trainable(part).items()}

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        """The mean loss of one row's answer.

        Args:
            inputs_embeds: ``[1, L, D]``; the last position is not read, its token is only a label.
            labels: ``[1, L]``, the answer's tokens at the end, ``IGNORED`` before them.
            use_cache: has no effect; accepted as an argument of transformers' models.
        """
        answer_N = labels[0][labels[0] != IGNORED]
        logits_NV = self._logits(inputs_embeds[:, :-1], len(answer_N))
        return CausalLMOutput(loss=cross_entropy(logits_NV.float(), answer_N))

    def loss(self, row: TokenRow) -> torch.Tensor:
        """The mean loss of a row's answer, a scalar."""
        ids_1L = torch.tensor([[*row.prompt, *row.answer]])
        labels_1L = ids_1L.clone()
        labels_1L[:, : len(row.prompt)] = IGNORED
        return self(self.embedded(ids_1L), labels_1L).loss  # type: ignore[no-any-return]

    def embedded(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The tokens' embeddings, ``[B, L, D]``."""
        module = self.bottom.family.backbone_of(self.bottom.model).get_submodule(self.bottom.family.embedding)
        return module(ids_BL)  # type: ignore[no-any-return]

    def _logits(self, x_1LD: torch.Tensor, answer: int) -> torch.Tensor:
        """The logits of the answer's N tokens, ``[N, V]``."""
        h_1LD = self.bottom.hidden(inputs_embeds=x_1LD, use_cache=False)
        length, tail = h_1LD.shape[1], self._boundary.tail
        crossing = length if tail is None else min(tail, length - answer + 1) + answer - 1
        stayed_1LD, h_1KD = h_1LD[:, : length - crossing], h_1LD[:, length - crossing :]
        up_1KD = project(self._secured(project(h_1KD, self._down)), self._up)
        g_1KD = self.trunk.hidden(inputs_embeds=up_1KD, use_cache=False)
        if not self._boundary.gradients:
            g_1KD, up_1KD = g_1KD.detach(), up_1KD.detach()
        if self._gate_D is not None:
            g_1KD = torch.cat([stayed_1LD, h_1KD + self._gate_D * (g_1KD - up_1KD)], dim=1)
        logits_NV: torch.Tensor = self.top.model(inputs_embeds=g_1KD, use_cache=False).logits[0, -answer:]
        return logits_NV

    def _secured(self, z_1KD: torch.Tensor) -> torch.Tensor:
        noise = path_noise(self._boundary.forward, z_1KD.shape[-1])
        if noise.of_sequence:
            z_1KD = z_1KD * (noise.clip / z_1KD.norm().clamp_min(1e-30)).clamp_max(1.0)
        else:
            z_1KD = clipped(z_1KD[0], noise.clip).unsqueeze(0)
        return z_1KD + noise.deviation * torch.randn_like(z_1KD) if self._noisy and noise.deviation else z_1KD


def frozen(whole: WholeModel) -> WholeModel:
    """The model in evaluation mode, without gradients."""
    return whole.requires_grad_(False).eval()


def losses(whole: WholeModel, rows: tuple[TokenRow, ...]) -> Iterator[float]:
    """Each row's mean loss over its answer's tokens, in the rows' order."""
    with torch.no_grad():
        for row in rows:
            yield float(whole.loss(row))
