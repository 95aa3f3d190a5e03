"""What a silo has released once: each example's hidden states, noised and encoded, as they left.

Shapes: B rows, L positions, T tokens of one row, D width.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.errors import ModelError, RunError
from isthmus.model.bottleneck import DOWN, project, tensor_of
from isthmus.model.cut import Part
from isthmus.model.packing import Packing
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.defence.shield import Shield
from isthmus.silo.records import Records
from isthmus.silo.secrets import read_secret
from isthmus.storage.store import Store
from isthmus.wire import isthmus_pb2 as pb


@dataclass(frozen=True)
class Ending:
    """One sequence, of which the last tokens cross."""

    row: tuple[int, ...]
    """Token ids, without padding."""
    length: int


class Released:
    """Gives each example a number, and releases it if that never happened before.

    A number is 64 bits of a hash, keyed by a secret of this silo, over the tokens, the base model, the bottleneck and
    what secures and encodes the states. So a silo that starts again knows its releases, other text or another bottom
    never passes for one (but by a chance of n²/2⁶⁵ among n examples), and numbers tell the trunk only which examples
    are the same.

    The bytes stay in the silo too: what the trunk has forgotten goes again as it was. Noise drawn anew would be a
    second release.

    Args:
        folder: of the bytes and the secret; in the silo's own directory.
        bottom: must not train.
        fingerprint: of the base model.
        shield: runs bottom, where sensitive text is to spread less.
    """

    def __init__(
        self,
        folder: Path,
        bottom: Part,
        boundary: Boundary,
        recipe: Recipe,
        fingerprint: str,
        shield: Shield | None = None,
    ) -> None:
        self._folder = folder
        self._bottom = bottom
        self._boundary = boundary
        self._shield = shield
        self._store = Store(folder)
        secured = recipe.boundary.forward.model_dump_json()
        told = [fingerprint, str(recipe.model.bottom), recipe.model.dtype, secured, recipe.boundary.codec.forward_up]
        if recipe.sensitivity is not None:
            told.append(recipe.sensitivity.model_dump_json())
        if (down_WD := tensor_of(bottom, DOWN)) is not None:
            told.append(hashlib.blake2b(down_WD.detach().cpu().numpy().tobytes()).hexdigest())
        self._hash = hashlib.blake2b("\n".join(told).encode(), key=read_secret(folder / "secret"), digest_size=8)

    def number(self, example: Ending) -> int:
        """Under which the trunk keeps this example."""
        digest = self._hash.copy()
        digest.update(array("q", (example.length, *example.row)).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def holds(self, example: Ending) -> bool:
        """Whether this example was released before."""
        return self.number(example) in self._store

    def like(self, tokens: int) -> torch.Tensor:
        """A tensor in the shape of so many tokens' released states, with bottom's device and dtype, without memory."""
        first, down_WD = next(self._bottom.parameters()), tensor_of(self._bottom, DOWN)
        return first.new_empty(1).expand(tokens, self._bottom.config.hidden_size if down_WD is None else len(down_WD))

    def release(self, examples: Iterable[Ending], step: int, records: Records) -> list[pb.Keep]:
        """The frames of those examples that were not released before; the ledger has them now, and the disk.

        Args:
            step: under which the ledger notes them.
            records: says whom they are about.

        Raises:
            ModelError: bottom trains.
            DiskFullError: the disk has no room for the ledger's line or the bytes. Nothing leaves.
        """
        if any(parameter.requires_grad for parameter in self._bottom.parameters()):
            raise ModelError(
                "bottom trains, but its hidden states are released once",
                remedy="freeze bottom, or set boundary.release_once = false",
            )
        new = {number: one for one in examples if (number := self.number(one)) not in self._store}
        about = [records.subjects([list(one.row)], [one.length]) for one in new.values()]
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
    def _run(self, examples: Collection[Ending]) -> list[torch.Tensor]:
        """What crosses of each, ``[T, W]``. Padded on the right, causal attention needs no mask."""
        rows, crossing = [one.row for one in examples], [one.length for one in examples]
        if not rows:
            return []
        device = next(self._bottom.parameters()).device
        packing = Packing.of_lengths(list(map(len, rows)), device, pad_left=False)
        ids_BL = torch.zeros(packing.real_BL.shape, dtype=torch.long, device=device)
        ids_BL[packing.real_BL] = torch.tensor([token for row in rows for token in row], device=device)
        bottom = self._bottom.eval()
        if self._shield is None:
            h_BLD = bottom.hidden(input_ids=ids_BL, use_cache=False)
        else:
            mask_BL = packing.real_BL.long()
            h_BLD = self._shield.hidden(bottom, input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
        h_BLD = project(h_BLD, tensor_of(self._bottom, DOWN))
        ends = zip(h_BLD, packing.lengths, crossing, strict=True)
        return [h_LD[length - last : length] for h_LD, length, last in ends]
