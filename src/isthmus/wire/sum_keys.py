"""Signed key offers: a silo's fresh keys for one masked sum, so that a relaying aggregator cannot substitute its
own."""

from __future__ import annotations

from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Identity


def sign_keys(identity: Identity, *, sealing: bytes, masking: bytes, commitment: bytes) -> pb.SumKeys:
    """These keys with this party's certificate and signature."""
    keys = pb.SumKeys(sealing=sealing, masking=masking, commitment=commitment, certificate=identity.certificate)
    keys.signature = identity.sign(_signed_bytes(identity.name, keys))
    return keys


def verify_keys(identity: Identity, name: str, keys: pb.SumKeys) -> None:
    """Raise ``IdentityError`` unless the party of this name in the federation has signed the keys."""
    identity.verify(name, keys.certificate, keys.signature, _signed_bytes(name, keys))


def _signed_bytes(name: str, keys: pb.SumKeys) -> bytes:
    return b"\0".join((b"isthmus keys of one sum", name.encode(), keys.sealing + keys.masking + keys.commitment))
