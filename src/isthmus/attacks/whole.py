"""The whole model as an adversary holds it, put together of its parts as silo and trunk do it, in one process.

It computes what the recipe says: a tail that crosses alone, a bottleneck, a residual path, clipping; noise if asked.

Shapes: L positions of one row (prompt and answer), N of them the answer's, K that cross, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from isthmus.attacks.gradients.lens import clipped
from isthmus.attacks.gradients.returned import noising
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Row
from isthmus.model import adapters
from isthmus.model.bottleneck import DOWN, GATE, UP, project, tensor_of
from isthmus.model.cut import Part, PartName

IGNORED = -100
NAMES: tuple[PartName, PartName, PartName] = ("bottom", "trunk", "top")


class Whole(nn.Module):
    """Bottom, trunk and top.

    Args:
        knowledge: whose adapters, as far as it knows them; the others are as the recipe starts with.
        noisy: noise is added where the silo would, from torch's global generator.
    """

    def __init__(self, knowledge: Knowledge, *, noisy: bool = False) -> None:
        super().__init__()
        self._boundary, self._noisy = knowledge.view.recipe.boundary, noisy
        self.bottom, self.trunk, self.top = map(knowledge.equipped, NAMES)
        self._down = tensor_of(self.bottom, DOWN)
        self._up, self._gate_D = tensor_of(self.trunk, UP), tensor_of(self.top, GATE)

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.bottom, self.trunk, self.top

    def adapter(self) -> dict[str, nn.Parameter]:
        """What trains, of all parts, by uncut name."""
        return {name: one for part in self.parts for name, one in adapters.trainable(part).items()}

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        """The mean loss of one row's answer.

        Args:
            inputs_embeds: ``[1, L, D]``; the answer's last token is a label only.
            labels: ``[1, L]``, the answer's tokens at its end, -100 before them.
        """
        answer_N = labels[0][labels[0] != IGNORED]
        logits_NV = self._logits(inputs_embeds[:, :-1], len(answer_N))
        return CausalLMOutput(loss=cross_entropy(logits_NV.float(), answer_N))

    def loss(self, row: Row) -> torch.Tensor:
        """The mean loss of a row's answer."""
        ids_1L = torch.tensor([[*row.prompt, *row.answer]])
        labels_1L = ids_1L.clone()
        labels_1L[:, : len(row.prompt)] = IGNORED
        return self(self.embedded(ids_1L), labels_1L).loss  # type: ignore[no-any-return]

    def embedded(self, ids_BL: torch.Tensor) -> torch.Tensor:
        module = self.bottom.family.backbone_of(self.bottom.model).get_submodule(self.bottom.family.embedding)
        return module(ids_BL)  # type: ignore[no-any-return]

    def _logits(self, x_1LD: torch.Tensor, answer: int) -> torch.Tensor:
        """Of the last positions, whose next tokens are the answer's, ``[N, V]``."""
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
        how = noising(self._boundary.forward, z_1KD.shape[-1])
        if how.of_sequence:
            z_1KD = z_1KD * (how.clip / z_1KD.norm().clamp_min(1e-30)).clamp_max(1.0)
        else:
            z_1KD = clipped(z_1KD[0], how.clip).unsqueeze(0)
        return z_1KD + how.noise * torch.randn_like(z_1KD) if self._noisy and how.noise else z_1KD


def frozen(whole: Whole) -> Whole:
    """To be read only."""
    return whole.requires_grad_(False).eval()


def losses(whole: Whole, rows: tuple[Row, ...]) -> Iterator[float]:
    """Each row's mean loss over its answer's tokens."""
    with torch.no_grad():
        for row in rows:
            yield float(whole.loss(row))
