"""Digests of safetensors files, over every byte of every tensor. They are cached by the file's size and times.

A file's layout: eight bytes with the length of the header, the header (JSON, padded with spaces), the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from isthmus.errors import ModelError, RunError
from isthmus.storage.files import writing
from isthmus.storage.sealed import seal, unseal

CHUNK = 8 * 2**20
"""Bytes that are read and hashed at a time."""
SETTLED = 2.0
"""Seconds that a file must be unchanged before its digests are cached: a second change within one tick of the file
system's clock has the same time."""
METADATA = "__metadata__"
REMEDY = "download the model again, or copy it again from where it is whole"
FileState = tuple[int, ...]
log = logging.getLogger(__name__)
_known: dict[tuple[str, FileState], dict[str, str]] = {}


def state_of(path: Path) -> FileState:
    """What changes when a file is written: device, inode, size, and the times of its last changes in nanoseconds.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", remedy=REMEDY) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digests_of(path: Path) -> dict[str, str]:
    """SHA-256, in hex, of each tensor's type, shape and bytes, by name; ``METADATA`` has the digest of the metadata.

    The file is read once in a process, and not at all if it was read before and is unchanged since, by ``state_of``.

    Raises:
        ModelError: the file is damaged, or was changed while it was read.
    """
    place, state = str(path.resolve()), state_of(path)
    known = _known.get((place, state)) or _cached(place, state)
    if known is None:
        known = _hashed(path)
        if state_of(path) != state:
            raise ModelError(f"{path} was changed while it was read", remedy="start again when it is complete")
        if time.time() - max(state[-2:]) / 1e9 < SETTLED:
            return known
        _keep(place, state, known)
    _known[place, state] = known
    return known


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: of each tensor ``dtype``, ``shape`` and ``data_offsets``, by name.

    Raises:
        ModelError: the file is missing, incomplete or damaged.
    """
    try:
        with safe_open(path, "pt"), path.open("rb") as file:  # safe_open checks types, shapes, offsets and the size
            text = file.read(int.from_bytes(file.read(8), "little"))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {_complaint(path, error)}", remedy=REMEDY) from error
    if not text.rstrip(b" ").endswith(b"}"):
        raise ModelError(f"cannot read {path}: its header is damaged", remedy=REMEDY)
    header: dict[str, Any] = json.loads(text)
    return header


def _complaint(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no safetensors file."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            return "it is the pointer that Git LFS left in place of the file; run 'git lfs pull' in its folder"
    return getattr(error, "strerror", None) or str(error)


def _hashed(path: Path) -> dict[str, str]:
    header = header_of(path)
    metadata = header.pop(METADATA, {})
    if metadata == {"format": "pt"}:  # what transformers writes says no more than none
        metadata = {}
    found = {METADATA: hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
            begin, end = entry["data_offsets"]
            _hash_bytes(file, start + begin, end - begin, digest)
            found[name] = digest.hexdigest()
    return found


def _hash_bytes(file: BinaryIO, begin: int, count: int, digest: Any) -> None:
    file.seek(begin)
    buffer = memoryview(bytearray(min(CHUNK, count)))
    while count:
        read = file.readinto(buffer[:count])  # type: ignore[attr-defined]
        if not read:
            raise ModelError(f"{file.name} was cut while it was read", remedy="start again when it is complete")
        digest.update(buffer[:read])
        count -= read


def _cache_file(place: str) -> Path | None:
    """Where the digests of the file at this place are kept; None: this user has no cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():
        home = os.environ.get("HOME", "")
        if not Path(home).is_absolute():
            return None
        base = f"{home}/.cache"
    return Path(base) / "isthmus" / "digests" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"


def _cached(place: str, state: FileState) -> dict[str, str] | None:
    file = _cache_file(place)
    if file is None:
        return None
    try:
        kept = json.loads(bytes(unseal(file.read_bytes())))
        if (kept["place"], tuple(kept["state"])) != (place, state):
            return None
        return {str(name): str(digest) for name, digest in kept["digests"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none yet, or a damaged one: hash again
        return None


def _keep(place: str, state: FileState, digests: dict[str, str]) -> None:
    file = _cache_file(place)
    if file is None:
        return
    try:
        with writing(file) as temporary:
            kept = {"place": place, "state": state, "digests": digests}
            temporary.write_bytes(seal(json.dumps(kept).encode()))
    except (RunError, UnicodeError) as error:  # without a cache the file is hashed at every start
        log.debug("digests of %s are not kept: %s", place, error)
