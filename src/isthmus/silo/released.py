"""The examples that a silo released: the noised, encoded hidden states of each, stored on the silo's disk."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from isthmus.errors import RunError
from isthmus.model.bottleneck import DOWN, layer_weight
from isthmus.model.cut import Part
from isthmus.model.rounded_linear import RoundedLinear
from isthmus.recipe import Recipe
from isthmus.silo.secrets import read_secret
from isthmus.storage.store import Store
from isthmus.wire import isthmus_pb2 as pb


class Released:
    """Identifiers of examples, and the stored release of each.

    An example is one sequence of which the last tokens cross. Its identifier is 64 bits of a keyed hash of the tokens,
    the base model, the bottleneck, and the mechanism and codec; the key is a secret of this silo. A restarted silo
    therefore recognizes its releases, and other text or another bottom has another identifier (n examples collide
    with a probability of n²/2⁶⁵). To the trunk, identifiers only show which examples are equal.

    The trunk may evict an example. The stored bytes are then sent again: new noise would be a second release.

    Args:
        folder: folder of the bytes and the secret, in the silo's own directory.
        bottom: the silo's bottom, which is frozen.
        fingerprint: the base model's (``Checkpoint.fingerprint``).
    """

    def __init__(self, folder: Path, bottom: Part, recipe: Recipe, fingerprint: str) -> None:
        self._folder = folder
        self._store = Store(folder)
        secured = recipe.boundary.forward.model_dump_json()
        identity = [
            fingerprint,
            str(recipe.model.bottom),
            recipe.model.dtype,
            secured,
            recipe.boundary.codec.forward_up,
        ]
        if rounded := {type(one).__name__ for one in bottom.modules() if isinstance(one, RoundedLinear)}:
            identity += sorted(rounded)
        if recipe.sensitivity is not None:
            identity.append(recipe.sensitivity.model_dump_json())
        if (down_WD := layer_weight(bottom, DOWN)) is not None:
            identity.append(hashlib.blake2b(down_WD.detach().cpu().numpy().tobytes()).hexdigest())
        self._hash = hashlib.blake2b("\n".join(identity).encode(), key=read_secret(folder / "secret"), digest_size=8)

    def number(self, row: list[int], length: int) -> int:
        """The identifier of the example ``row``, of which the last ``length`` tokens cross; 0 to 2⁶⁴ − 1."""
        digest = self._hash.copy()
        digest.update(array("q", (length, *row)).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def __contains__(self, number: int) -> bool:
        """Whether this example was released before."""
        return number in self._store

    def write(self, number: int, matrix: pb.Matrix) -> None:
        """Store an example's release.

        Raises:
            DiskFullError: the disk is full.
        """
        self._store.write(number, matrix.SerializeToString())

    def frames(self, numbers: Iterable[int]) -> Iterator[pb.Keep]:
        """The frames of these examples with the bytes that were released, without repeats.

        Raises:
            RunError: a stored release is missing from the disk.
        """
        for number in dict.fromkeys(numbers):
            data = self._store.read(number)
            if data is None:
                raise RunError(
                    f"the released example {number:016x} is missing from {self._folder}",
                    remedy="restart the silo: it releases the example again and charges its privacy budget again",
                )
            yield pb.Keep(example=number, hidden=pb.Matrix.FromString(data))
