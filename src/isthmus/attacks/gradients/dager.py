"""Exact search for text in LoRA gradients: DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586).

The gradient of a linear layer's weight is a sum over tokens of (error) · (input)ᵀ: its rows span the inputs. With fewer
tokens than dimensions, a token's input lies in that span exactly and hardly any other's does. The first block's inputs
name the tokens; the next block's, which depend on all that came before, order them: right prefixes stay in the span.

With LoRA, W + B·A: the gradient of A [r, D] spans the inputs x of at most r tokens, but vanishes while B is zero; that
of B [out, r] spans A·x, in r dimensions only, so that fewer than r tokens can be told. With A frozen, as exact
averaging has it, there is only the latter.

Shapes: B sequences, L positions, N inputs, D width, K dimensions in which a span is seen, R its rank, V vocabulary.
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
"""Singular values below this share of the largest are rounding."""
TINY = 1e-12
"""An input shorter than this (a padding token's) is in no span."""
TOKENWISE = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""Layers whose input, in the first block, is one token's alone."""
BLIND = ("q_proj", "k_proj")
"""Layers without a gradient from a text's first token: it attends to itself alone."""
CHUNK = 512
"""Sequences run at a time."""


@dataclass(frozen=True)
class Span:
    """What one gradient tells of its layer's inputs."""

    block: int
    layer: str
    """The layer's module name within the part."""
    basis_KR: torch.Tensor
    """Orthonormal columns."""
    down_KD: torch.Tensor | None
    """The adapter's A, if inputs are seen only through it."""
    most: int
    """Rank at which the span stops telling anything for certain."""

    @property
    def rank(self) -> int:
        return self.basis_KR.shape[1]

    @property
    def of_token(self) -> bool:
        """Whether the inputs depend on one token, not on those before it."""
        return self.block == 0 and self.layer.endswith(TOKENWISE)

    @property
    def everywhere(self) -> bool:
        """Whether first tokens show, too."""
        return not self.layer.endswith(BLIND)

    @property
    def exact(self) -> bool:
        """Whether all inputs lie in the span and others do not: there were few enough."""
        return 0 < self.rank < self.most

    def distance(self, x_ND: torch.Tensor) -> torch.Tensor:
        """How far each input lies outside the span, from 0 (within) to 1 (orthogonal), ``[N]``."""
        x_NK = x_ND.double() if self.down_KD is None else x_ND.double() @ self.down_KD.T
        norm_N = x_NK.norm(dim=1)
        outside_NK: torch.Tensor = x_NK - (x_NK @ self.basis_KR) @ self.basis_KR.T
        return torch.where(norm_N > TINY, outside_NK.norm(dim=1) / norm_N.clamp_min(TINY), 1.0)


class ExactSearch:
    """Tokens and sequences of one silo's batch, from the gradient of its adapters.

    Who has this: the root (a silo's update after one step of SGD is its gradient, times a number that does not matter),
    with the public base model and the shared adapters of the round's beginning. If it pools with the trunk, ``part``
    may reach into the trunk's blocks and ``gradient`` hold their adapters' gradients, too.

    Args:
        part: the first blocks with the embedding, with adapters as the round began.
        gradient: by uncut name.
        noise: standard deviation on the gradient, in its own units: singular values that noise explains are not used.
        tolerance: how far outside a span an input may lie. Under noise no input lies in it exactly.

    Raises:
        DataError: no tensor is of an adapted layer of the first block.
    """

    def __init__(
        self, part: Part, gradient: Mapping[str, torch.Tensor], *, noise: float = 0.0, tolerance: float = 1e-2
    ) -> None:
        self._part, self._tolerance = part, tolerance
        self.spans = [span for span in _spans(part, gradient, noise) if span.rank]
        if not any(name.startswith(part.family.block_prefix() + "0.") for name in gradient):
            raise DataError("no gradient of the first block's adapter", remedy="give the adapter tensors of bottom")
        self._first = _everywhere([span for span in self.spans if span.of_token])
        self._deeper = [span for span in self.spans if not span.of_token and span.exact]

    def obstacles(self, *, steps: int = 1, optimizer: str = "sgd") -> list[str]:
        """Why the search is not exact here; empty if it is.

        Args:
            steps: optimizer steps behind the update.
            optimizer: the recipe's.
        """
        found = []
        if optimizer != "sgd":
            found.append(f"{optimizer} scales every coordinate by itself: an update's rows do not span the inputs")
        if steps > 1:
            found.append(f"{steps} steps: the span holds all their tokens, and later blocks' inputs moved between them")
        if not self._first:
            found.append("the first block's gradient is zero, or noise explains all of it")
        elif not any(span.exact for span in self._first):
            most = max(span.most for span in self._first)
            found.append(f"the gradient has full rank: {most} tokens or more, or noise")
        elif all(span.rank == span.most - 1 and span.down_KD is None for span in self._first if span.exact):
            most = max(span.most for span in self._first)
            found.append(f"the gradient of A has full rank: if there are {most} tokens or more, none lies in its span")
        if not self._deeper:
            found.append("no later block whose span is exact: tokens can be found, but not their order")
        return found

    @torch.no_grad()
    def distances(self) -> torch.Tensor:
        """How far each token of the vocabulary is from being in the batch, ``[V]``; all 1 if nothing can be told."""
        vocabulary = int(self._part.config.vocab_size)
        layers = [span.layer for span in self._first]
        pieces = []
        for start in range(0, vocabulary, CHUNK):
            ids_B1 = torch.arange(start, min(start + CHUNK, vocabulary)).unsqueeze(1)
            inputs = _inputs(self._part, ids_B1, layers)
            pieces.append(_worst(self._first, [inputs[layer][:, 0] for layer in layers], len(ids_B1)))
        return torch.cat(pieces)

    def tokens(self, count: int | None = None) -> list[int]:
        """Tokens in the batch, surest first.

        Args:
            count: how many; None: those within the tolerance, if the search is exact (see ``obstacles``), else none.
        """
        distance_V = self.distances()
        order = distance_V.argsort()
        if count is not None:
            return [int(token) for token in order[:count]]
        if not any(span.exact for span in self._first):
            return []
        return [int(token) for token in order if distance_V[token] <= self._tolerance]

    def sequences(self, *, longest: int, beam: int = 64, candidates: Sequence[int] | None = None) -> list[list[int]]:
        """Texts of the batch, from their beginnings as far as they stay in the later blocks' spans.

        Args:
            longest: most tokens of a text.
            beam: most prefixes followed at a time.
            candidates: tokens to build texts of; None: ``tokens()``.

        Returns:
            Texts that cannot be extended, longest first; without a later block's span, none. A text's last token has no
            loss after it, so it leaves no trace and is never among them.
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
        return _without_echoes(sorted(finished + prefixes, key=len, reverse=True))

    @torch.no_grad()
    def _extended(self, prefixes: list[list[int]], pool: list[int], beam: int) -> list[list[int]]:
        """Those of all prefixes with one more token that stay in the spans, the nearest ``beam``."""
        tried = [[*prefix, token] for prefix in prefixes for token in pool]
        spans = self._deeper if prefixes != [[]] else _everywhere(self._deeper)
        layers = [span.layer for span in spans]
        pieces = [torch.empty(0, dtype=torch.float64)]
        for start in range(0, len(tried), CHUNK):
            ids_BL = torch.tensor(tried[start : start + CHUNK])
            inputs = _inputs(self._part, ids_BL, layers)
            pieces.append(_worst(spans, [inputs[layer][:, -1] for layer in layers], len(ids_BL)))
        distance_B = torch.cat(pieces)
        return [tried[number] for number in distance_B.argsort()[:beam] if distance_B[number] <= self._tolerance]


def _spans(part: Part, gradient: Mapping[str, torch.Tensor], noise: float) -> list[Span]:
    """The span of every adapter tensor of the part that has a gradient."""
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
            spans.append(Span(block, inner, basis_KR, None, len(tensor) + 1))
        else:
            down_KD = own[f"{layer}.lora_A.weight"].double()
            spans.append(Span(block, inner, basis_KR, down_KD, tensor.shape[1]))
    return spans


def _without_echoes(texts: list[list[int]]) -> list[list[int]]:
    """Less the repetitions of a text's first token: attention over equal inputs gives the same, however many."""
    varied = {text[0] for text in texts if len(set(text)) > 1}
    return [text for text in texts if len(set(text)) > 1 or text[0] not in varied]


def _everywhere(spans: list[Span]) -> list[Span]:
    """Those in which first tokens show, too, if any are exact; those alone fit every token."""
    kept = [span for span in spans if span.everywhere and span.exact]
    return kept or spans


def _row_space(tensor: torch.Tensor, noise: float) -> torch.Tensor:
    """Orthonormal columns that span the rows, but for those that rounding or noise explain (Marchenko–Pastur edge)."""
    _, sizes, rows = torch.linalg.svd(tensor.double(), full_matrices=False)
    edge = noise * (tensor.shape[0] ** 0.5 + tensor.shape[1] ** 0.5)
    kept = sizes > max(edge, PRECISION * float(sizes[0]), 1e-30)
    basis_KR: torch.Tensor = rows[kept].T
    return basis_KR


def _worst(spans: Sequence[Span], inputs: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The largest distance over the spans that tell something, ``[N]``."""
    worst_N = torch.zeros(count, dtype=torch.float64)
    telling = [(span, x_ND) for span, x_ND in zip(spans, inputs, strict=True) if span.exact]
    for span, x_ND in telling or list(zip(spans, inputs, strict=True)):
        worst_N = torch.maximum(worst_N, span.distance(x_ND))
    return worst_N if spans else worst_N + 1


class _Seen(Exception):  # noqa: N818 (not an error: the rest of the part need not run)
    pass


def _inputs(part: Part, ids_BL: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """What each of these layers is given, ``[B, L, D]``, when the part reads these tokens."""
    seen: dict[str, torch.Tensor] = {}

    def note(layer: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[layer] = arguments[0]
            if len(seen) == len(set(layers)):
                raise _Seen

        return keep

    with ExitStack() as stack, suppress(_Seen):
        for layer in layers:
            stack.callback(part.model.get_submodule(layer).register_forward_pre_hook(note(layer)).remove)
        part.hidden(input_ids=ids_BL, use_cache=False)
    return seen
