"""The service ``Model``: to each silo the files of its own parts of the model, and nothing of the rest."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.model.cut import Cut
from isthmus.model.portion import write_portion
from isthmus.recipe import Recipe
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from isthmus.wire.senders import check_sender

PIECE_BYTES = 2**20
"""Bytes of a file in one answer."""
MODEL, START = "model", "start"
"""Folders of a silo's files: its parts of the model, and the adapter that training begins with."""


class ModelFiles:
    """Serves the files that silos need of the model. What a cut needs is written once, and kept.

    Args:
        recipe: gives the federation's as it is now.
        folder: where portions of the model are kept.
    """

    def __init__(self, recipe: Callable[[], Recipe], folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        self._portions: dict[tuple[int, int], _Portion] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="portions of the model")

    def handle(self, peer: str, request: Message) -> Answer:
        check_sender("the model's server", "Model", "silo", request)
        if isinstance(request, pb.Ping):
            return answered(pb.Pong())
        answer: Answer = Answer()
        self._writer.submit(self._answer, answer, peer, request)
        return answer

    def _answer(self, answer: Answer, peer: str, request: Message) -> None:
        try:
            portion = self._portion(peer)
            if isinstance(request, pb.Fetch):
                answer.set_result(pb.Fetched(data=portion.read(request.name, request.offset)))
            else:
                answer.set_result(portion.listed)
        except BaseException as error:
            answer.set_exception(error)

    def _portion(self, silo: str) -> _Portion:
        recipe = self._recipe()
        ends = recipe.deepest(silo)
        if ends not in self._portions:
            folder = self._folder / f"{ends[0]}-{ends[1]}"
            shutil.rmtree(folder, ignore_errors=True)
            fingerprint = write_portion(recipe.model.path, Cut(*ends), folder / MODEL)
            if recipe.lora.start is not None:
                shutil.copytree(recipe.lora.start, folder / START)
            self._portions[ends] = _Portion(folder, fingerprint)
        return self._portions[ends]


@dataclass(frozen=True)
class _Portion:
    """The files for one cut."""

    folder: Path
    fingerprint: str

    @cached_property
    def files(self) -> dict[str, Path]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    @cached_property
    def listed(self) -> pb.Listed:
        files = [
            pb.File(name=name, size=path.stat().st_size, digest=_digest(path)) for name, path in self.files.items()
        ]
        return pb.Listed(files=files, fingerprint=self.fingerprint)

    def read(self, name: str, offset: int) -> bytes:
        if name not in self.files:
            raise ProtocolError(f"{name!r} is no file of this silo's parts", remedy="ask for those that are listed")
        with self.files[name].open("rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
