"""The boundary: the silo's only exit for tensors. It clips, adds noise, encodes, counts bytes, notes the release.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from isthmus.privacy.events import Path, Release
from isthmus.privacy.ledger import Ledger, MemoryLedger
from isthmus.privacy.mechanisms import Gaussian, secret_generator
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb


class Boundary:
    """Everything that leaves a silo leaves through one of these methods.

    Args:
        section: mechanism and codec of each path.
        ledger: notes each release before it leaves.
        generator: source of the noise; a fresh secret one by default.
    """

    def __init__(
        self, section: BoundarySection, ledger: Ledger | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        self._codec = section.codec
        self._mechanisms: dict[Path, Gaussian] = {
            "forward": Gaussian.of(section.forward),
            "gradient": Gaussian.of(section.gradient),
            "update": Gaussian.of(section.update),
        }
        self._ledger = ledger or MemoryLedger()
        self._generator = generator or secret_generator()
        self.released_bytes: Counter[str] = Counter()
        """Payload bytes that left, by path."""
        self.admitted_bytes = 0

    def release(self, h_TD: torch.Tensor, path: Path, step: int, subjects: Subjects) -> pb.Matrix:
        """Secure ``h_TD`` and encode it; from here on it may leave, as often as the wire needs.

        Args:
            subjects: whom its rows are about.
        """
        secured = self._mechanisms[path].apply(h_TD, self._generator, subjects.factors_T)
        if path == "gradient":
            matrix = codec.encode(secured, self._codec.gradient_up, self._generator)
        else:
            matrix = codec.encode(secured, self._codec.forward_up)
        self._note(path, step, matrix.rows, matrix.width, len(matrix.data))
        return matrix

    def release_update(self, tensors: Mapping[str, torch.Tensor], step: int) -> list[pb.Tensor]:
        """Secure an adapter update as one long row, in the order of the names, and encode it."""
        names = sorted(tensors)
        row = torch.cat([tensors[name].reshape(-1) for name in names]).unsqueeze(0)
        secured = self._mechanisms["update"].apply(row, self._generator)[0]
        pieces = torch.split(secured, [tensors[name].numel() for name in names])
        shaped = {name: piece.view(tensors[name].shape) for name, piece in zip(names, pieces, strict=True)}
        encoded = codec.encode_named(shaped)
        self._note("update", step, 1, row.shape[1], sum(len(tensor.data) for tensor in encoded))
        return encoded

    def admit(self, matrix: pb.Matrix, path: Path, like_TD: torch.Tensor) -> torch.Tensor:
        """A tensor that came in on this path, which must have the shape of ``like_TD``; on its device and in its dtype.

        Raises:
            FrameError: it is anything else.
        """
        rows, width = like_TD.shape
        self.admitted_bytes += len(matrix.data)
        name = self._codec.gradient_down if path == "gradient" else self._codec.forward_down
        return codec.decode(matrix, rows=rows, width=width, codec=name).to(like_TD)

    def _note(self, path: Path, step: int, rows: int, width: int, size: int) -> None:
        mechanism = self._mechanisms[path]
        self._ledger.record(Release(path, step, rows, width, mechanism.clip, mechanism.noise, size))
        self.released_bytes[path] += size
