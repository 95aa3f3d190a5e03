"""The keys with which the silo's own people use the gateway."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Self

from isthmus.errors import IdentityError

SHORTEST_KEY = 16
"""Characters."""
OTHERS = 0o077
"""Permission bits by which others than its owner may read or write a file."""


class ApiKeys:
    """The accepted keys. They are kept as digests and compared in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The keys of a file, one a line; empty lines and those that begin with ``#`` are skipped.

        Raises:
            IdentityError: the file cannot be read, is open to others than its owner, or holds no key, or a short one.
        """
        try:
            mode, lines = path.stat().st_mode, path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise IdentityError(
                f"the file of API keys {path} cannot be read", remedy="name a text file with a key a line"
            ) from error
        if mode & OTHERS:
            raise IdentityError(
                f"the file of API keys {path} is open to others (mode {mode & 0o777:03o})",
                remedy=f"close it: chmod 600 {path}; and replace the keys if others may have read them",
            )
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys or min(map(len, keys)) < SHORTEST_KEY:
            found = "holds no key" if not keys else f"holds a key of fewer than {SHORTEST_KEY} characters"
            raise IdentityError(
                f"the file of API keys {path} {found}",
                remedy="write long random ones, such as of: openssl rand -hex 24",
            )
        return cls(keys)

    def owner(self, authorization: str) -> int | None:
        """The number, from 1, of the key in the value of a header ``Authorization``; None: it is not ``Bearer`` and one
        of the keys."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        numbered = enumerate(self._digests, 1)
        found = max(number * hmac.compare_digest(given, known) for number, known in numbered)  # whichever it is
        return found if found and scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
