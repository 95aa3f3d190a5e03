"""Answers about examples that come again, written as differences from the answers before.

From epoch to epoch the trunk's answer about an example changes little. Both sides keep the last one as it was decoded;
the silo names its own by a digest, and the trunk writes the difference if it has the same, else the whole answer. So a
side that lost its copy, or never got an answer, costs bytes and nothing else.

Shapes: L tokens of an example, T of all examples of a batch, D the model's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from isthmus.errors import FrameError
from isthmus.storage.store import Store
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb

NONE = 0
"""The digest of no answer."""
Bases = Sequence[torch.Tensor | None]
"""For each sequence the answer before, ``[L, D]``; None: there is none."""
_KEPT = codec.MATRIX_CODECS["bf16"]
"""How an answer is kept."""
_REMEDY = "both sides must run the same version of isthmus with the same recipe"


class KeptAnswers:
    """The last answer about each example, by the example's number, on disk as bf16.

    Args:
        width: D.
        bound: largest number of bytes of all; those that were not asked for longest go first. None: the disk's.
    """

    def __init__(self, folder: Path, width: int, bound: int | None = None) -> None:
        self._store, self._width = Store(folder, bound), width

    def read(self, number: int, length: int) -> torch.Tensor | None:
        """The answer, bf16 ``[L, D]``; None if there is none of this length."""
        value = self._store.read(number)
        if value is None or len(value) != _KEPT.most_bytes(length, self._width):
            return None
        return _KEPT.decode(value, length, self._width)

    def write(self, number: int, answer_LD: torch.Tensor) -> None:
        """Keep this answer in place of the one before, unless it alone is larger than all may be.

        Raises:
            DiskFullError: the disk is full.
        """
        value = _KEPT.encode(answer_LD)
        if self._store.fits(len(value)):
            self._store.write(number, value)


def digest(base_LD: torch.Tensor | None) -> int:
    """64 bits by which the two sides know that they have the same answer."""
    if base_LD is None:
        return NONE
    return int.from_bytes(hashlib.blake2b(_KEPT.encode(base_LD), digest_size=8).digest(), "little")


def encode_answers(h_TD: torch.Tensor, lengths: Sequence[int], bases: Bases, name: str) -> pb.Hidden:
    """The answer to a forward of these sequences.

    Args:
        name: the codec; one of ``wire.codec.RANGE_CODECS``.
    """
    rows = torch.split(h_TD, list(lengths))
    changed = [number for number, base in enumerate(bases) if base is not None]
    whole = [row for row, base in zip(rows, bases, strict=True) if base is None]
    answer = pb.Hidden(changed=changed)
    if whole:
        answer.hidden.CopyFrom(codec.encode(torch.cat(whole), name))
    if changed:
        new_TD, base_TD = torch.cat([rows[number] for number in changed]), _joined(bases)
        answer.changes.CopyFrom(codec.encode(new_TD, name, reference_TD=base_TD))
    return answer


def decode_answers(
    answer: pb.Hidden, lengths: Sequence[int], bases: Bases, name: str, width: int
) -> list[torch.Tensor]:
    """Each sequence's answer, fp32 ``[L, D]``.

    Args:
        bases: the answers before, of which the sender may have written differences.
        width: D.

    Raises:
        FrameError: a difference from an answer that is not among ``bases``, or a matrix is not as expected.
    """
    changed = list(answer.changed)
    if any(number >= len(lengths) or bases[number] is None for number in changed):
        raise FrameError("received a change of an answer that was not named", remedy=_REMEDY)
    used = [base if number in changed else None for number, base in enumerate(bases)]
    others = [number for number in range(len(lengths)) if number not in changed]
    found: dict[int, torch.Tensor] = {}
    parts = ((others, answer.hidden, None), (changed, answer.changes, _joined(used) if changed else None))
    for numbers, matrix, reference_TD in parts:
        own = [lengths[number] for number in numbers]
        if own:
            h_TD = codec.decode(matrix, rows=sum(own), width=width, codec=name, reference_TD=reference_TD)
            found |= dict(zip(numbers, torch.split(h_TD, own), strict=True))
    return [found[number] for number in range(len(lengths))]


def _joined(bases: Bases) -> torch.Tensor:
    return torch.cat([base for base in bases if base is not None])
