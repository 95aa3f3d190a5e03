"""What silos sign for one masked sum: their fresh keys, so that a relaying aggregator cannot substitute its own, and
who is in the sum, so that it cannot say this to one and that to another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress

from isthmus.errors import IdentityError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Identity


def plan_digest(plan: pb.Plan) -> bytes:
    """SHA-256 of all that a plan says, adapters and keys included, as its receiver got it.

    The masks of a sum follow from it: what silos send that were told different things adds up to noise. A root could
    otherwise tell one silo's update from the others' by giving these adapters with which they cannot learn (Pasquini,
    Francati and Ateniese 2022).
    """
    return hashlib.sha256(b"isthmus plan\0" + plan.SerializeToString(deterministic=True)).digest()


def sign_keys(identity: Identity, *, sealing: bytes, masking: bytes, commitment: bytes) -> pb.SumKeys:
    """These keys with this party's certificate and signature."""
    keys = pb.SumKeys(sealing=sealing, masking=masking, commitment=commitment, certificate=identity.certificate)
    keys.signature = identity.sign(_signed_bytes(identity.name, keys))
    return keys


def verify_keys(identity: Identity, name: str, keys: pb.SumKeys) -> None:
    """Raise ``IdentityError`` unless the party of this name in the federation has signed the keys."""
    identity.verify(name, keys.certificate, keys.signature, _signed_bytes(name, keys))


def sign_survivors(identity: Identity, digest: bytes, living: pb.Survivors, *, learned: bool) -> bytes:
    """This party's signature of who is in a sum.

    Args:
        digest: of all terms of the sum.
        learned: whether the party's own numbers in it are a change, not zeros.
    """
    return identity.sign(_survivors_bytes(identity.name, digest, _lists(living), learned))


def signers(
    identity: Identity,
    keys: Mapping[str, pb.SumKeys],
    signatures: Mapping[str, bytes],
    digest: bytes,
    living: pb.Survivors,
    *,
    enough: int,
    changes: int = 0,
) -> dict[str, bool]:
    """The silos in a sum that have signed that exactly these are in it, and whether they signed that their numbers are
    a change. A signature of anything else does not count.

    Args:
        keys: of all silos in the sum, already verified.
        digest: of all terms of the sum.
        enough, changes: how many signatures are looked for, and how many of a change; no more are verified.
    """
    found: dict[str, bool] = {}
    lists = _lists(living)
    for name in sorted(set(living.alive) & signatures.keys() & keys.keys()):
        if len(found) >= enough and sum(found.values()) >= changes:
            break
        for learned in (True, False):
            signed = _survivors_bytes(name, digest, lists, learned)
            with suppress(IdentityError):
                identity.verify(name, keys[name].certificate, signatures[name], signed)
                found[name] = learned
                break
    return found


def _lists(living: pb.Survivors) -> bytes:
    return pb.Survivors(alive=sorted(living.alive), dropped=sorted(living.dropped)).SerializeToString()


def _survivors_bytes(name: str, digest: bytes, lists: bytes, learned: bool) -> bytes:
    return b"\0".join(
        (b"isthmus survivors of one sum", name.encode(), b"a change" if learned else b"zeros", digest + lists)
    )


def _signed_bytes(name: str, keys: pb.SumKeys) -> bytes:
    return b"\0".join((b"isthmus keys of one sum", name.encode(), keys.sealing + keys.masking + keys.commitment))
