"""What the split model calls in its silo: trunk, boundary, records, the defence of bottom, and drafts.

The rooms that implement these are above ``model``.

Shapes: B rows, L new positions, T positions that cross, D the model's width, W the width that crosses.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from isthmus.model.cache import SplitCache, TrunkSession
from isthmus.model.crossing import Outbound, Reply
from isthmus.model.cut import Part
from isthmus.model.packing import Packing
from isthmus.privacy.subjects import Subjects

Rows = list[list[int]]
"""Token ids of sequences, without padding. They never cross; the boundary maps them to records."""


class TrunkModule(Protocol):
    """The trunk as the split model calls it."""

    def __call__(self, outbound: Outbound) -> Reply:
        """Run the trunk's blocks and wait for the answer."""
        ...

    def open_session(self) -> TrunkSession:
        """Open a session with an empty KV cache on the trunk."""
        ...


class ReleasedExamples(Protocol):
    """The examples that a silo released, each of them once."""

    def number(self, row: list[int], length: int) -> int:
        """The identifier of the example ``row``, of which the last ``length`` tokens cross."""
        ...

    def __contains__(self, number: int) -> bool:
        """Whether this example was released before."""
        ...


class RecordFinder(Protocol):
    """Maps sequences to the records they belong to (``silo.records``)."""

    def subjects(self, rows: Rows | None, lengths: list[int]) -> Subjects:
        """The records that sequences belong to.

        Args:
            rows: token ids of each whole sequence; None for embeddings.
            lengths: number of each sequence's last tokens that cross.
        """
        ...


class ModelBoundary(Protocol):
    """The part of the silo's boundary that the model uses (``silo.boundary``)."""

    @property
    def released(self) -> ReleasedExamples | None:
        """The released examples if each is released once; None: hidden states leave at every forward."""
        ...

    clips: bool
    """Whether hidden states are clipped before they leave."""

    @property
    def records(self) -> RecordFinder:
        """Maps sequences to records."""
        ...

    def clipped(self, h_TW: torch.Tensor, path: Any, subjects: Subjects) -> torch.Tensor:
        """The tensor clipped as a release on this path would clip it; differentiable."""
        ...


class BottomShield(Protocol):
    """Runs bottom so that sensitive tokens spread less into the hidden states that leave (``silo.defence.shield``)."""

    def hidden(self, bottom: Part, session: Any = None, **inputs: Any) -> torch.Tensor:
        """Bottom's hidden states, ``[B, L, D]``; arguments as for ``bottom.hidden``.

        Args:
            session: the session of the cache in ``inputs``, if there is one.
        """
        ...


class BottomGuard(Protocol):
    """Adds a loss that trains bottom to reveal less of the text (``silo.defence.guard``)."""

    def __call__(
        self,
        h_BLD: torch.Tensor,
        packing: Packing,
        rows: Rows,
        targets_T: torch.Tensor,
        subjects: Subjects,
        share: float,
    ) -> torch.Tensor:
        """``h_BLD`` unchanged; in backward the gradient of the guard's loss, times ``share``, is added to its own."""
        ...


@runtime_checkable
class Drafting(Protocol):
    """An assistant model with a candidate generator of its own."""

    def candidates(self, cache: SplitCache, processors: Any, generation_config: Any) -> Any:
        """A transformers ``CandidateGenerator`` for one generation with this cache."""
        ...
