"""Sealed files: a checksum before the content, so that a rotten disk cannot change what is loaded."""

from __future__ import annotations

import hashlib

MAGIC = b"isthmus1"
DIGEST_BYTES = 32
SEAL_BYTES = len(MAGIC) + DIGEST_BYTES
"""Bytes before the content: ``isthmus1`` and the content's SHA-256."""


class DamagedError(ValueError):
    """Bytes that are not what was sealed. Callers turn it into an error that names the file and a remedy."""


def seal(content: bytes | memoryview) -> bytes:
    """The content with its checksum before it."""
    return b"".join((MAGIC, hashlib.sha256(content).digest(), content))


def unseal(sealed: bytes) -> memoryview:
    """The content of sealed bytes.

    Raises:
        DamagedError: the bytes have no seal, or the content is not what was sealed.
    """
    whole = memoryview(sealed)
    if whole[: len(MAGIC)] != MAGIC:
        raise DamagedError("it has no checksum: its first bytes are damaged, or an older version wrote it")
    content = whole[SEAL_BYTES:]
    if hashlib.sha256(content).digest() != whole[len(MAGIC) : SEAL_BYTES]:
        raise DamagedError("its checksum does not match: it is damaged or cut off")
    return content
