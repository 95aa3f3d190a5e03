"""One end of a TLS connection whose bytes others carry: from a silo's key to the root's, whatever is between them."""

from __future__ import annotations

import ssl
import struct
import tempfile
from typing import Any

from isthmus.errors import FrameSizeError, IdentityError
from isthmus.wire.identity import Identity

_LENGTH = struct.Struct(">I")
_REMEDY = (
    "both sides need valid certificates of the same authority, made by 'isthmus join' or 'isthmus certificates', "
    "and clocks that are right"
)


class Secured:
    """Messages in, bytes of TLS 1.3 out, and back. Both sides show certificates of the federation's authority.

    Nothing is sent here: ``outgoing`` is to reach the other end's ``receive`` in the same order, by any way.

    Args:
        identity: this party's.
        server: the name on the certificate that the other end must show; None: this end is the server.
        limit: largest message in bytes.
    """

    def __init__(self, identity: Identity, *, server: str | None = None, limit: int = 64 * 2**20) -> None:
        self._limit = limit
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = _context(identity, server=server is None)
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server is None, server_hostname=server)
        self.established = False
        """Whether the other end has shown its certificate."""
        self._waiting: list[bytes] = []
        """Messages to be sent once it has."""
        self._received = bytearray()
        self._advance()

    def send(self, message: bytes) -> None:
        """Put a message among the outgoing bytes, once the connection is established.

        Raises:
            FrameSizeError: it is larger than the limit.
        """
        self._check(len(message))
        self._waiting.append(_LENGTH.pack(len(message)) + message)
        self._flush()

    def outgoing(self) -> bytes:
        """The bytes for the other end since the last call."""
        return self._leaving.read()

    @property
    def has_outgoing(self) -> bool:
        return self._leaving.pending > 0

    def receive(self, data: bytes) -> list[bytes]:
        """The messages that bytes from the other end complete.

        Raises:
            IdentityError: one end does not trust the other, or the bytes were changed on their way.
            FrameSizeError: a message is larger than the limit.
        """
        self._arrived.write(data)
        self._advance()
        if self.established:
            self._read()
        return self._messages()

    def certificate(self) -> bytes:
        """The other end's PEM certificate, with those of intermediate authorities that it has sent."""
        return b"".join(ssl.DER_cert_to_PEM_cert(one).encode() for one in _chain(self._tls))

    def _advance(self) -> None:
        if self.established:
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise _distrust(error) from error
        self.established = True
        self._flush()

    def _flush(self) -> None:
        if self.established:
            for message in self._waiting:
                self._tls.write(message)
            self._waiting.clear()

    def _read(self) -> None:
        try:
            while part := self._tls.read(2**16):
                self._received += part
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise _distrust(error) from error

    def _messages(self) -> list[bytes]:
        found, start = [], 0
        while len(self._received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            self._check(length)
            begin = start + _LENGTH.size
            if len(self._received) < begin + length:
                break
            found.append(bytes(self._received[begin : begin + length]))
            start = begin + length
        del self._received[:start]
        return found

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise FrameSizeError(
                f"a frame has {size:,} bytes; the limit is {self._limit:,}",
                remedy="raise wire.max_frame_bytes on both sides",
            )


def _context(identity: Identity, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=identity.authority.decode())
    if server:
        context.num_tickets = 0  # no connection is resumed, and each ticket would be a message of its own
    with tempfile.NamedTemporaryFile(prefix="isthmus-") as pair:  # the module reads files alone; this one is private
        pair.write(identity.key + b"\n" + identity.certificate)
        pair.flush()
        context.load_cert_chain(pair.name)
    return context


def _chain(tls: ssl.SSLObject) -> list[bytes]:
    """DER certificates that the other end sent, its own first."""
    if hasattr(tls, "get_unverified_chain"):  # from Python 3.13 on
        return list(tls.get_unverified_chain())
    inner: Any = tls._sslobj  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in inner.get_unverified_chain() or ()]


def _distrust(error: ssl.SSLError) -> IdentityError:
    return IdentityError(f"no trusted connection through Flower: {error.reason or error}"[:400], remedy=_REMEDY)
