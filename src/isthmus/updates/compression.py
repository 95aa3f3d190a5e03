"""Fewer bytes for an adapter update, open and under masks.

Two things make an update small: fewer numbers (``projections``, or the largest of each silo's own) and fewer bits a
number. The error of compression stays in the silo and is added to its next update (error feedback, Seide et al. 2014,
Karimireddy et al. 2019), so that in the end everything arrives.

Compression comes after the boundary's clip and noise, and the error that waits is that of the noised row: what was
secured less what crossed. So all that ever crosses is computed from rows that the boundary released and charged in
full, whatever is sent of them, when and how often: post-processing, which costs no privacy and is charged no second
time. The error of the clean row would be less noisy in the end, but it would have to pass the clip together with the
next change, which leaves less room for that, and the silo would carry clean data across rounds that no release has
accounted for.

PowerSGD (Vogels et al. 2019) is not here: a LoRA factor is low-rank already. Of rank 8, its best case is 8 times fewer
numbers, at rank 1.

Shapes: P parameters, K numbers that cross.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import zstandard

from isthmus.errors import FrameError, RecipeError
from isthmus.privacy.distributed_gaussian import SumNoise, sum_noise
from isthmus.privacy.noise import secret_generator
from isthmus.recipe import FederationSection, Recipe
from isthmus.updates.flat import Layout
from isthmus.updates.projections import Projection, random_k, sketch
from isthmus.updates.quantize import BITS, Ring
from isthmus.updates.sums import SumFormat
from isthmus.wire import codec

CODECS = {4: "int4", 8: "int8", 16: "fp16", 32: "fp32"}
"""The codec of an open update's numbers, by their bits. 4 and 8 are rounded at random, without bias."""
GAPS, BITMAP = 0, 1
"""The two ways to write the places of the largest numbers."""
_REMEDY = "give silo and root one recipe and one version of isthmus"


class Compressor(Protocol):
    """An open update's row as bytes, and back."""

    @property
    def most_bytes(self) -> int:
        """The most bytes that a row takes."""
        ...

    def encode(self, row_P: torch.Tensor) -> bytes: ...

    def decode(self, data: bytes) -> torch.Tensor:
        """The row, fp32, P.

        Raises:
            FrameError: bytes that were never encoded for this row.
        """
        ...


@dataclass(frozen=True)
class Numbers:
    """So many numbers by a codec of matrices."""

    size: int
    codec: str

    @property
    def most_bytes(self) -> int:
        return codec.MATRIX_CODECS[self.codec].most_bytes(1, self.size)

    def encode(self, values_K: torch.Tensor) -> bytes:
        return codec.MATRIX_CODECS[self.codec].encode(values_K.unsqueeze(0), secret_generator())

    def decode(self, data: bytes) -> torch.Tensor:
        return codec.MATRIX_CODECS[self.codec].decode(data, 1, self.size)[0].float()


class Linear:
    """A projection's numbers, by a codec of matrices."""

    def __init__(self, projection: Projection, codec: str) -> None:
        self._projection = projection
        self._numbers = Numbers(projection.size, codec)
        self.most_bytes = self._numbers.most_bytes

    def encode(self, row_P: torch.Tensor) -> bytes:
        return self._numbers.encode(self._projection.project(row_P))

    def decode(self, data: bytes) -> torch.Tensor:
        return self._projection.lift(self._numbers.decode(data))


class TopK:
    """The largest numbers (Aji and Heafield 2017), and where they are: as gaps between them or as one bit a parameter,
    whichever zstd makes smaller.

    Bytes: which of the two (uint8), their length (uint32), the places, the values.
    """

    def __init__(self, total: int, kept: int, codec: str) -> None:
        self._total, self._kept = total, kept
        self._numbers = Numbers(kept, codec)
        longest = max(4 * kept, math.ceil(total / 8))
        self.most_bytes = 5 + longest + longest // 128 + 64 + self._numbers.most_bytes  # zstd may add a little

    def encode(self, row_P: torch.Tensor) -> bytes:
        places_K = row_P.abs().topk(self._kept, sorted=False).indices.sort().values
        marked_P = np.zeros(self._total, np.bool_)
        marked_P[places_K.numpy()] = True
        gaps_K = np.diff(places_K.numpy(), prepend=-1).astype("<u4")
        planes = gaps_K.view(np.uint8).reshape(-1, 4).T  # nearly all gaps are small: three planes are nearly empty
        written = [zstandard.compress(planes.tobytes()), zstandard.compress(np.packbits(marked_P).tobytes())]
        how = GAPS if len(written[GAPS]) <= len(written[BITMAP]) else BITMAP
        head = bytes([how]) + len(written[how]).to_bytes(4, "little")
        return head + written[how] + self._numbers.encode(row_P[places_K])

    def decode(self, data: bytes) -> torch.Tensor:
        how, end = data[:1], 5 + int.from_bytes(data[1:5], "little")
        if len(data) < end or how not in (bytes([GAPS]), bytes([BITMAP])):
            raise FrameError(f"{len(data)} bytes that say of no places", remedy=_REMEDY)
        places_K = self._gaps(data[5:end]) if how[0] == GAPS else self._bitmap(data[5:end])
        row_P = torch.zeros(self._total)
        row_P[torch.from_numpy(places_K)] = self._numbers.decode(data[end:])
        return row_P

    def _gaps(self, data: bytes) -> np.ndarray:
        planes = codec.decompressed(data, 4 * self._kept)
        if len(planes) != 4 * self._kept:
            raise FrameError(f"{len(planes)} bytes of gaps, {4 * self._kept} expected", remedy=_REMEDY)
        bytes_K4 = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, -1).T)
        gaps_K = bytes_K4.view("<u4")[:, 0].astype(np.int64)
        places_K = gaps_K.cumsum() - 1
        if not gaps_K.all() or places_K[-1] >= self._total:
            raise FrameError("a place that is named twice or is none", remedy=_REMEDY)
        return places_K

    def _bitmap(self, data: bytes) -> np.ndarray:
        length = math.ceil(self._total / 8)
        bits = np.unpackbits(np.frombuffer(codec.decompressed(data, length), np.uint8))
        if len(bits) != 8 * length or bits[self._total :].any() or bits.sum(dtype=np.int64) != self._kept:
            raise FrameError(f"places that are not {self._kept} of {self._total}", remedy=_REMEDY)
        return bits.nonzero()[0]


@dataclass(frozen=True)
class Compression:
    """The compression of a federation's updates, the same at silo and root."""

    section: FederationSection = field(default_factory=FederationSection)
    seed: int = 0
    """The seed of projections, which all parties know."""
    noise: SumNoise | None = None
    """The noise of sums under masks; None: they have none of their own."""

    @classmethod
    def of(cls, recipe: Recipe) -> Compression:
        return cls(recipe.federation, recipe.seed, sum_noise(recipe))

    def projection(self, size: int, round: int) -> Projection | None:
        """The projection of rows of so many numbers in this round; None: all numbers cross, or each silo's largest."""
        unbiased = not self.section.compression.feedback
        match self.section.compression.kind:
            case "random-k":
                return random_k(size, self._kept(size), self.seed, round, unbiased=unbiased)
            case "sketch":
                return sketch(size, self._kept(size), self.seed, round, unbiased=unbiased)
        return None

    def compressor(self, size: int, round: int) -> Compressor | None:
        """The compressor of open updates of so many numbers in this round; None: they cross in full, by name."""
        if self.exact:
            return None
        name = CODECS[self.section.compression.bits or 32]
        if self.section.compression.kind == "top-k":
            return TopK(size, self._kept(size), name)
        projection = self.projection(size, round)
        return Numbers(size, name) if projection is None else Linear(projection, name)

    def sum_format(self, layout: Layout, round: int, silos: int, clip: float = 0.0) -> SumFormat:
        """The format of a masked sum in this round.

        Args:
            layout: of each silo's change.
            silos: most silos whose numbers are added.
            clip: largest L2 norm of the numbers that cross, where sums are noised.

        Raises:
            RecipeError: the sum of so many silos' numbers and noise does not fit into the ring.
        """
        projection = self.projection(layout.size, round)
        count = layout.size if projection is None else projection.size
        return SumFormat(layout, self.ring(silos, count, clip), projection, self.indicators)

    def ring(self, silos: int, size: int = 0, clip: float = 0.0) -> Ring:
        """The ring of the numbers under masks.

        Args:
            size, clip: where sums are noised: how many numbers cross, and their largest norm in this round.
        """
        plain = Ring(silos, self.section.secure.range, self.section.compression.bits or BITS)
        if self.noise is None:
            return plain
        return replace(plain, range=clip or 1.0, spare=self.noise.reach(plain.levels, size, silos))

    @property
    def indicators(self) -> int:
        """Numbers between those of the change and the share: 1 where silos say whether it was within the clip."""
        return 1 if self.noise is not None and self.noise.norms > 0 else 0

    @property
    def exact(self) -> bool:
        """Whether updates cross in full, unchanged."""
        return self.section.compression.exact

    def feedback(self) -> ErrorFeedback | None:
        """A silo's error feedback, empty; None: what compression leaves out is not sent later."""
        return ErrorFeedback() if self.section.compression.feedback and not self.exact else None

    def _kept(self, size: int) -> int:
        return max(1, round(self.section.compression.keep * size))


class ErrorFeedback:
    """The compression errors of a silo's updates so far, added to its next updates.

    Rounds that train other tensors have errors of their own: each waits for its next turn.
    """

    def __init__(self) -> None:
        self._errors: dict[str, torch.Tensor] = {}

    def added(self, names: Iterable[str], row_P: torch.Tensor) -> torch.Tensor:
        """This row of these tensors plus the error of their last update.

        Raises:
            RecipeError: they were of another length.
        """
        error_P = self._errors.get(" ".join(sorted(names)))
        if error_P is None:
            return row_P
        if error_P.shape != row_P.shape:
            raise RecipeError("the silo's state is of another model", remedy="continue a run with its own recipe")
        return row_P + error_P

    def keep(self, names: Iterable[str], error_P: torch.Tensor) -> None:
        """Keep the error of these tensors' update: what it should have been less what crossed."""
        self._errors[" ".join(sorted(names))] = error_P

    def state_dict(self) -> dict[str, Any]:
        return dict(self._errors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._errors = dict(state)
