"""The examples that a silo has released once: their hidden states, noised and encoded, as they left."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from isthmus.errors import RunError
from isthmus.model.bottleneck import DOWN, layer_weight
from isthmus.model.cut import Part
from isthmus.recipe import Recipe
from isthmus.silo.secrets import read_secret
from isthmus.storage.store import Store
from isthmus.wire import isthmus_pb2 as pb


class Released:
    """Gives each example a number, and keeps on disk what was released under it.

    An example is one sequence of which the last tokens cross. Its number is 64 bits of a hash, keyed by a secret of
    this silo, over the tokens, the base model, the bottleneck, and all that secures and encodes the states. So a silo
    that starts again knows its releases, other text or another bottom never passes for one (but by a chance of n²/2⁶⁵
    among n examples), and numbers tell the trunk only which examples are the same.

    The trunk may forget an example. It is then sent again as it was: noise drawn anew would be a second release.

    Args:
        folder: of the bytes and the secret; in the silo's own directory.
        bottom: it does not train.
        fingerprint: of the base model.
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
        if recipe.sensitivity is not None:
            identity.append(recipe.sensitivity.model_dump_json())
        if (down_WD := layer_weight(bottom, DOWN)) is not None:
            identity.append(hashlib.blake2b(down_WD.detach().cpu().numpy().tobytes()).hexdigest())
        self._hash = hashlib.blake2b("\n".join(identity).encode(), key=read_secret(folder / "secret"), digest_size=8)

    def number(self, row: list[int], length: int) -> int:
        """The number of the example that is the last ``length`` tokens of this row."""
        digest = self._hash.copy()
        digest.update(array("q", (length, *row)).tobytes())
        return int.from_bytes(digest.digest(), "little")

    def __contains__(self, number: int) -> bool:
        """Whether this example was released before."""
        return number in self._store

    def write(self, number: int, matrix: pb.Matrix) -> None:
        """Keep an example as it is released.

        Raises:
            DiskFullError: there is no room.
        """
        self._store.write(number, matrix.SerializeToString())

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
