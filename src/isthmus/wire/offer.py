"""Offers: a silo's fresh keys for one masked sum, signed, so that whoever passes them on cannot put in its own."""

from __future__ import annotations

from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Identity


def signed(identity: Identity, *, sealing: bytes, masking: bytes, promise: bytes) -> pb.SumKeys:
    """These keys, as this party's."""
    keys = pb.SumKeys(sealing=sealing, masking=masking, promise=promise, certificate=identity.certificate)
    keys.signature = identity.sign(_signed(identity.name, keys))
    return keys


def verify(identity: Identity, name: str, keys: pb.SumKeys) -> None:
    """Raise ``IdentityError`` unless this party of the federation has signed the keys."""
    identity.verify(name, keys.certificate, keys.signature, _signed(name, keys))


def _signed(name: str, keys: pb.SumKeys) -> bytes:
    return b"\0".join((b"isthmus keys of one sum", name.encode(), keys.sealing + keys.masking + keys.promise))
