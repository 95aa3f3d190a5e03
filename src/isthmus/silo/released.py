"""What a silo has released once: each example's hidden states, noised and encoded, as they left.

Shapes: B rows, L positions, T tokens of one row, D width.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from isthmus.errors import ModelError, RunError
from isthmus.model.cut import Part
from isthmus.model.packing import Packing
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import Recipe
from isthmus.report.store import Store
from isthmus.silo.boundary import Boundary
from isthmus.silo.held import read_secret
from isthmus.silo.register import Register
from isthmus.wire import isthmus_pb2 as pb

Row = list[int]
"""Token ids of one sequence, without padding."""


class Released:
    """Gives each example a number, and releases it if that never happened before.

    A number is 64 bits of a hash, keyed by a secret of this silo, over the tokens, the base model and what secures and
    encodes the states. So a silo that starts again knows its releases, other text or another bottom never passes for
    one (but by a chance of n²/2⁶⁵ among n examples), and numbers tell the trunk only which examples are the same.

    The bytes stay in the silo too: what the trunk has forgotten goes again as it was. Noise drawn anew would be a
    second release.

    Args:
        folder: of the bytes and the secret; in the silo's own directory.
        bottom: must not train.
        fingerprint: of the base model.
    """

    def __init__(self, folder: Path, bottom: Part, boundary: Boundary, recipe: Recipe, fingerprint: str) -> None:
        self._folder = folder
        self._bottom = bottom
        self._boundary = boundary
        self._store = Store(folder)
        secured = recipe.boundary.forward.model_dump_json()
        told = (fingerprint, str(recipe.model.bottom), recipe.model.dtype, secured, recipe.boundary.codec.forward_up)
        self._hash = hashlib.blake2b("\n".join(told).encode(), key=read_secret(folder / "secret"), digest_size=8)

    def number(self, row: Row) -> int:
        """Under which the trunk keeps this row."""
        digest = self._hash.copy()
        digest.update(array("q", row).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def holds(self, row: Row) -> bool:
        """Whether this row was released before."""
        return self.number(row) in self._store

    def like(self, tokens: int) -> torch.Tensor:
        """A tensor in the shape of so many tokens' hidden states, with bottom's device and dtype, without memory."""
        first = next(self._bottom.parameters())
        return first.new_empty(1).expand(tokens, self._bottom.config.hidden_size)

    def release(self, rows: Iterable[Row], step: int, register: Register) -> list[pb.Keep]:
        """The frames of those rows that were not released before; the ledger has them now, and the disk.

        Args:
            step: under which the ledger notes them.
            register: says whom they are about.

        Raises:
            ModelError: bottom trains.
            DiskFullError: the disk has no room for the ledger's line or the bytes. Nothing leaves.
        """
        if any(parameter.requires_grad for parameter in self._bottom.parameters()):
            raise ModelError(
                "bottom trains, but its hidden states are released once",
                remedy="freeze bottom, or set boundary.release_once = false",
            )
        new = {number: row for row in rows if (number := self.number(row)) not in self._store}
        about = [register.subjects([row], [len(row)]) for row in new.values()]
        states = zip(new, self._run(new.values()), about, strict=True)
        return [self._released(number, h_TD, step, subjects) for number, h_TD, subjects in states]

    def again(self, numbers: Iterable[int]) -> Iterator[pb.Keep]:
        """The frames of these examples as they were when they were released.

        Raises:
            RunError: the silo's disk has lost one.
        """
        for number in dict.fromkeys(numbers):
            data = self._store.read(number)
            if data is None:
                raise RunError(
                    f"the released example {number:016x} is gone from {self._folder}",
                    remedy="start the silo again: it will be released, and charged, once more",
                )
            yield pb.Keep(example=number, hidden=pb.Matrix.FromString(data))

    def _released(self, number: int, h_TD: torch.Tensor, step: int, subjects: Subjects) -> pb.Keep:
        matrix = self._boundary.release(h_TD, "forward", step, subjects)
        self._store.write(number, matrix.SerializeToString())
        return pb.Keep(example=number, hidden=matrix)

    @torch.no_grad()
    def _run(self, rows: Iterable[Row]) -> list[torch.Tensor]:
        """Bottom's result for each row, ``[T, D]``. Padded on the right, causal attention needs no mask at all."""
        lengths = [len(row) for row in rows]
        if not lengths:
            return []
        device = next(self._bottom.parameters()).device
        packing = Packing.of_lengths(lengths, device, pad_left=False)
        ids_BL = torch.zeros(packing.real_BL.shape, dtype=torch.long, device=device)
        ids_BL[packing.real_BL] = torch.tensor([token for row in rows for token in row], device=device)
        h_BLD = self._bottom.eval().hidden(input_ids=ids_BL, use_cache=False)
        return [h_LD[:length] for h_LD, length in zip(h_BLD, lengths, strict=True)]
