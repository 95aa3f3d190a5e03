"""Exact recovery of text from LoRA gradients: DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586).

The gradient of a linear layer's weight is a sum over tokens of (error) · (input)ᵀ, so its rows span the inputs. If a
batch has fewer tokens than the layer has input dimensions, the inputs of its tokens lie exactly in that span and hardly
any other token's does. The first block's inputs identify the tokens. The next block's inputs depend on all earlier
tokens, so they identify the order: right prefixes stay in the span.

With LoRA, W + B·A: the gradient of A [r, D] spans the inputs x of at most r tokens, but is zero while B is zero. The
gradient of B [out, r] spans A·x in r dimensions only, so it identifies fewer than r tokens. With A frozen, as exact
averaging requires, only the gradient of B exists.

Shapes: B sequences, L positions, N inputs, D width, K dimensions of a span's space, R its rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import nn

from isthmus.errors import DataError
from isthmus.model import adapters
from isthmus.model.cut import Part

PRECISION = 1e-6
"""Singular values below this share of the largest are taken as rounding errors."""
LEAST_NORM = 1e-12
"""Norm below which an input, such as a padding token's, is in no span."""
TOKENWISE = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""Layers whose input in the first block depends on one token only."""
FIRST_TOKEN_BLIND = ("q_proj", "k_proj")
"""Layers with zero gradient from a text's first token, which attends only to itself."""
SEQUENCES_A_PASS = 512
"""Sequences per forward pass."""


@dataclass(frozen=True)
class GradientSpan:
    """The row space of one gradient: the span of its layer's inputs."""

    block: int
    """Index of the block within the part."""
    layer: str
    """The layer's module name within the part."""
    basis_KR: torch.Tensor
    """Orthonormal basis of the span, as columns."""
    down_KD: torch.Tensor | None
    """The adapter's A if the span is that of A·x; None: the span is that of x."""
    capacity: int
    """Rank from which on the span does not identify inputs."""

    @property
    def rank(self) -> int:
        """Dimension of the span."""
        return self.basis_KR.shape[1]

    @property
    def of_token(self) -> bool:
        """Whether each input depends on one token only, not on those before it."""
        return self.block == 0 and self.layer.endswith(TOKENWISE)

    @property
    def covers_first(self) -> bool:
        """Whether the span holds the inputs of first tokens too."""
        return not self.layer.endswith(FIRST_TOKEN_BLIND)

    @property
    def exact(self) -> bool:
        """Whether the span holds all inputs and no others, because they are few enough."""
        return 0 < self.rank < self.capacity

    def distance(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Distance of each input to the span relative to its norm, 0 (inside) to 1 (orthogonal), ``[N]``, fp64."""
        x_NK = x_ND.double() if self.down_KD is None else x_ND.double() @ self.down_KD.T
        norm_N = x_NK.norm(dim=1)
        outside_NK: torch.Tensor = x_NK - (x_NK @ self.basis_KR) @ self.basis_KR.T
        return torch.where(norm_N > LEAST_NORM, outside_NK.norm(dim=1) / norm_N.clamp_min(LEAST_NORM), 1.0)


class ExactSearch:
    """DAGER on the adapter gradient of one silo's batch.

    Adversary: the root, with the public base model and the shared adapters at the beginning of the round. A silo's
    update after one step of SGD is its gradient times a constant, which does not matter. If the root pools with the
    trunk, ``part`` and ``gradient`` may include blocks of the trunk.

    Args:
        part: the first blocks with the embedding, with the adapters at the beginning of the round.
        gradient: adapter gradient by uncut name.
        noise: standard deviation of the noise on the gradient; singular values that noise explains are not used.
        tolerance: largest relative distance to a span at which an input counts as inside. With noise no input lies
            exactly inside.

    Raises:
        DataError: ``gradient`` has no tensor of the first block.
    """

    def __init__(
        self, part: Part, gradient: Mapping[str, torch.Tensor], *, noise: float = 0.0, tolerance: float = 1e-2
    ) -> None:
        self._part, self._tolerance = part, tolerance
        self.spans = [span for span in _spans(part, gradient, noise) if span.rank]
        if not any(name.startswith(part.family.block_prefix() + "0.") for name in gradient):
            raise DataError("no gradient of the first block's adapter", remedy="include the adapter tensors of bottom")
        self._first = _covering_first([span for span in self.spans if span.of_token])
        self._deeper = [span for span in self.spans if not span.of_token and span.exact]

    def obstacles(self, *, steps: int | None = 1, optimizer: str = "sgd") -> list[str]:
        """Reasons why the recovery is not exact, for people; empty if it is exact.

        Args:
            steps: number of optimizer steps behind the update; None: several.
            optimizer: name of the optimizer behind the update.
        """
        reasons = []
        if optimizer != "sgd":
            reasons.append(f"{optimizer} scales each coordinate on its own: an update's rows do not span the inputs")
        if steps != 1:
            many = "several" if steps is None else steps
            reasons.append(f"{many} steps: the span mixes their tokens, and later blocks' inputs changed between them")
        if not self._first:
            reasons.append("the first block's gradient is zero, or noise explains all of it")
        elif not any(span.exact for span in self._first):
            capacity = max(span.capacity for span in self._first)
            reasons.append(f"the gradient has full rank: {capacity} tokens or more, or noise")
        elif all(span.rank == span.capacity - 1 and span.down_KD is None for span in self._first if span.exact):
            capacity = max(span.capacity for span in self._first)
            reasons.append(f"the gradient of A has full rank: of {capacity} tokens or more it identifies none")
        if not self._deeper:
            reasons.append("no later block has an exact span: tokens can be recovered, but not their order")
        return reasons

    @torch.no_grad()
    def distances(self) -> torch.Tensor:
        """Each vocabulary token's largest distance to the first block's spans, ``[V]``, fp64; all 1 without spans."""
        vocabulary = int(self._part.config.vocab_size)
        layers = [span.layer for span in self._first]
        pieces = []
        for start in range(0, vocabulary, SEQUENCES_A_PASS):
            ids_B1 = torch.arange(start, min(start + SEQUENCES_A_PASS, vocabulary)).unsqueeze(1)
            inputs = _inputs(self._part, ids_B1, layers)
            pieces.append(_worst(self._first, [inputs[layer][:, 0] for layer in layers], len(ids_B1)))
        return torch.cat(pieces)

    def tokens(self, count: int | None = None) -> list[int]:
        """Tokens of the batch, the nearest to the spans first.

        Args:
            count: number of tokens; None: all within the tolerance if a span is exact, else none.
        """
        distance_V = self.distances()
        order = distance_V.argsort()
        if count is not None:
            return [int(token) for token in order[:count]]
        if not any(span.exact for span in self._first):
            return []
        return [int(token) for token in order if distance_V[token] <= self._tolerance]

    def sequences(self, *, longest: int, beam: int = 64, candidates: Sequence[int] | None = None) -> list[list[int]]:
        """Texts of the batch, found by extending prefixes that stay in the spans of later blocks.

        Args:
            longest: most tokens of a text.
            beam: most prefixes that are kept at a time.
            candidates: tokens of which texts consist; None: ``tokens()``.

        Returns:
            Texts that cannot be extended, the longest first; none without an exact span of a later block. A text's last
            token is never recovered: no loss follows it, so it has no gradient.
        """
        pool = self.tokens() if candidates is None else list(candidates)
        if not pool or not self._deeper:
            return []
        finished: list[list[int]] = []
        prefixes: list[list[int]] = [[]]
        for _ in range(longest):
            grown = self._extended(prefixes, pool, beam)
            stems = {tuple(one[:-1]) for one in grown}
            finished += [one for one in prefixes if one and tuple(one) not in stems]
            prefixes = grown
        return _without_repetitions(sorted(finished + prefixes, key=len, reverse=True))

    @torch.no_grad()
    def _extended(self, prefixes: list[list[int]], pool: list[int], beam: int) -> list[list[int]]:
        """All prefixes with one more token that stay in the spans, at most the nearest ``beam``."""
        tried = [[*prefix, token] for prefix in prefixes for token in pool]
        spans = self._deeper if prefixes != [[]] else _covering_first(self._deeper)
        layers = [span.layer for span in spans]
        pieces = [torch.empty(0, dtype=torch.float64)]
        for start in range(0, len(tried), SEQUENCES_A_PASS):
            ids_BL = torch.tensor(tried[start : start + SEQUENCES_A_PASS])
            inputs = _inputs(self._part, ids_BL, layers)
            pieces.append(_worst(spans, [inputs[layer][:, -1] for layer in layers], len(ids_BL)))
        distance_B = torch.cat(pieces)
        return [tried[number] for number in distance_B.argsort()[:beam] if distance_B[number] <= self._tolerance]


def _spans(part: Part, gradient: Mapping[str, torch.Tensor], noise: float) -> list[GradientSpan]:
    """The span of each adapter tensor of the part that has a gradient."""
    own = adapters.adapter_of(part)
    prefix = part.family.block_prefix()
    spans = []
    for name, tensor in sorted(gradient.items()):
        layer, found, factor = name.partition(".lora_")
        if not found or name not in own or not name.startswith(prefix):
            continue
        block = int(layer.removeprefix(prefix).partition(".")[0]) - part.first_block
        inner = f"{prefix}{block}{layer.removeprefix(prefix)[len(str(block + part.first_block)) :]}"
        basis_KR = _row_space(tensor, noise)
        if factor.startswith("A"):  # r rows in D dimensions: r tokens still fit
            spans.append(GradientSpan(block, inner, basis_KR, None, len(tensor) + 1))
        else:
            down_KD = own[f"{layer}.lora_A.weight"].double()
            spans.append(GradientSpan(block, inner, basis_KR, down_KD, tensor.shape[1]))
    return spans


def _without_repetitions(texts: list[list[int]]) -> list[list[int]]:
    """The texts without mere repetitions of a token that begins another text: attention over equal inputs gives the
    same result for any number of them."""
    varied = {text[0] for text in texts if len(set(text)) > 1}
    return [text for text in texts if len(set(text)) > 1 or text[0] not in varied]


def _covering_first(spans: list[GradientSpan]) -> list[GradientSpan]:
    """The exact spans that hold first tokens too; all spans if there are none."""
    kept = [span for span in spans if span.covers_first and span.exact]
    return kept or spans


def _row_space(tensor: torch.Tensor, noise: float) -> torch.Tensor:
    """Orthonormal basis of the row space, as columns, without directions that rounding or noise explain (below the
    Marchenko–Pastur edge)."""
    _, sizes, rows = torch.linalg.svd(tensor.double(), full_matrices=False)
    edge = noise * (tensor.shape[0] ** 0.5 + tensor.shape[1] ** 0.5)
    kept = sizes > max(edge, PRECISION * float(sizes[0]), 1e-30)
    basis_KR: torch.Tensor = rows[kept].T
    return basis_KR


def _worst(spans: Sequence[GradientSpan], inputs: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The largest distance over the exact spans, or over all spans if none is exact, ``[N]``."""
    worst_N = torch.zeros(count, dtype=torch.float64)
    exact = [(span, x_ND) for span, x_ND in zip(spans, inputs, strict=True) if span.exact]
    for span, x_ND in exact or list(zip(spans, inputs, strict=True)):
        worst_N = torch.maximum(worst_N, span.distance(x_ND))
    return worst_N if spans else worst_N + 1


class _Recorded(Exception):  # noqa: N818 (not an error: the rest of the part need not run)
    pass


def _inputs(part: Part, ids_BL: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """The inputs of these layers by name, ``[B, L, D]`` each, when the part reads these tokens."""
    seen: dict[str, torch.Tensor] = {}

    def recorder(layer: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = arguments[0]
            if len(seen) == len(set(layers)):
                raise _Recorded

        return record

    with ExitStack() as stack, suppress(_Recorded):
        for layer in layers:
            stack.callback(part.model.get_submodule(layer).register_forward_pre_hook(recorder(layer)).remove)
        part.hidden(input_ids=ids_BL, use_cache=False)
    return seen
