"""Sealed bytes: the content comes back, or nothing does."""

from __future__ import annotations

import pytest

from isthmus.storage.sealed import SEAL_BYTES, DamagedError, seal, unseal


@pytest.mark.parametrize("content", [b"", b"x", bytes(3000)])
def test_the_content_comes_back(content: bytes) -> None:
    sealed = seal(content)
    assert unseal(sealed) == content
    assert len(sealed) == len(content) + SEAL_BYTES


def test_every_flipped_bit_and_every_cut_is_seen() -> None:
    sealed = seal(b"content")
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            unseal(bytes(flipped))
    for length in range(len(sealed)):
        with pytest.raises(DamagedError):
            unseal(sealed[:length])


def test_an_older_format_is_said() -> None:
    with pytest.raises(DamagedError, match="an older version wrote it"):
        unseal(b"PK\x03\x04" + bytes(100))
