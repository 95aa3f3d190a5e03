"""The answers that the trunk gave about each silo's kept examples, from which later ones are written as differences."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import torch

from isthmus.model.answers import KeptAnswers, decode_answers, digest, encode_answers
from isthmus.recipe import Recipe
from isthmus.wire import isthmus_pb2 as pb


class EarlierAnswers:
    """The last answer about each example, by silo. Each silo has an equal share of ``trunk.kept_bytes``.

    Args:
        folder: holds one folder for each silo.
        width: the model's.
    """

    def __init__(self, folder: Path, recipe: Recipe, width: int) -> None:
        self._folder, self._width = folder, width
        self._share = recipe.trunk.kept_bytes // len(recipe.silo)
        self._codec = recipe.boundary.codec.forward_down
        self._kept: dict[str, KeptAnswers] = {}
        self._one_at_a_time = Lock()

    def encode(self, silo: str, request: pb.Forward, h_TD: torch.Tensor) -> pb.Hidden:
        """The answer to a forward that names examples; it is kept as the silo decodes it.

        Args:
            h_TD: the trunk's output, ``[T, D]``.

        Raises:
            DiskFullError: the disk is full.
        """
        numbers, lengths = list(request.examples), list(request.lengths)
        with self._one_at_a_time:
            kept = self._of(silo)
            bases = [kept.read(number, length) for number, length in zip(numbers, lengths, strict=True)]
            named = zip(bases, request.answered, strict=True)
            same = [base if digest(base) == one else None for base, one in named]
            answer = encode_answers(h_TD, lengths, same, self._codec)
            decoded = decode_answers(answer, lengths, same, self._codec, self._width)
            for number, answer_LD in zip(numbers, decoded, strict=True):
                kept.write(number, answer_LD)
            return answer

    def _of(self, silo: str) -> KeptAnswers:
        if silo not in self._kept:
            self._kept[silo] = KeptAnswers(self._folder / silo, self._width, self._share)
        return self._kept[silo]
