"""The root's signature of a version of the shared adapters, with which silos show the trunk that it is there.

Where silos wait for nobody, each says by itself which version it begins with. The trunk keeps its own state beside the
first silo's begin with a version, and ends all steps with the last one, so it must not take a silo's word for it.
"""

from __future__ import annotations

from isthmus.errors import ProtocolError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Identity


def sign_version(identity: Identity, run: str, version: int) -> pb.Published:
    """The root's word that this version is there.

    Args:
        identity: of the root's server; the trunk's, where one server is both.
        run: name of the run of the trunk that it is to be shown to.
        version: number of finished rounds.
    """
    return pb.Published(certificate=identity.certificate, signature=identity.sign(_signed_bytes(run, version)))


def verify_version(identity: Identity, shown: pb.Published, run: str, version: int) -> None:
    """Check that the root has published a version.

    Args:
        identity: the trunk's.
        shown: what a silo shows for it.
        run: name of the trunk's run.

    Raises:
        ProtocolError: nothing is shown.
        IdentityError: the certificate is neither the root's nor the trunk's own, or did not sign this version of this
            run.
    """
    if not shown.signature:
        raise ProtocolError(
            f"version {version} without the root's signature",
            remedy="send on what the root's plan has for it; update isthmus on all sides",
        )
    signed = _signed_bytes(run, version)
    if shown.certificate == identity.certificate:
        identity.verify(identity.name, shown.certificate, shown.signature, signed, role="trunk")
    else:
        identity.verify("root", shown.certificate, shown.signature, signed, role="root")


def _signed_bytes(run: str, version: int) -> bytes:
    return b"\0".join((b"isthmus version of a run", run.encode(), str(version).encode()))
