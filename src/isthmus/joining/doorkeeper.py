"""The service ``Authority``: certificates for guests with an invite, and new ones for parties before theirs expire."""

from __future__ import annotations

import logging

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID
from google.protobuf.message import Message

from isthmus.errors import IdentityError, ProtocolError
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from isthmus.wire.identity import Role, common_name
from isthmus.wire.invite import GUEST
from isthmus.wire.senders import check_sender

GUEST_PREFIX = "guest "
"""Before a guest's number in its peer name; no party's name has a space."""
log = logging.getLogger(__name__)


class AuthorityService:
    """Answers guests and parties from an authority's folder (see ``wire.server.Doorkeeper``)."""

    def __init__(self, folder: AuthorityFolder) -> None:
        self.folder = folder

    def anchors(self) -> bytes:
        """PEM certificates by which TLS trusts the guests; of invites that are over, too, so that they are told so."""
        return "".join(one.anchor for one in self.folder.invites()).encode()

    def admit(self, certificate: bytes) -> str:
        """A guest's peer name; empty if the certificate is no guest's.

        Raises:
            IdentityError: the invite is not open, or the certificate is not signed by the invite that it names.
        """
        read = x509.load_pem_x509_certificates(certificate)[0]
        units = read.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        if GUEST not in [one.value for one in units]:
            return ""
        id = common_name(read)
        invite = next((one for one in self.folder.invites() if one.id == id), None)
        try:
            if invite is None:
                raise InvalidSignature
            read.verify_directly_issued_by(x509.load_pem_x509_certificate(invite.anchor.encode()))
        except (ValueError, TypeError, InvalidSignature) as error:
            raise IdentityError(
                "this invite is not of this federation", remedy="ask who leads the federation for a new invite"
            ) from error
        invite.check()
        return f"{GUEST_PREFIX}{id}"

    def added(self) -> frozenset[str]:
        """As ``AuthorityFolder.added``."""
        return self.folder.added()

    def role_of(self, name: str) -> Role:
        """As ``AuthorityFolder.role_of``."""
        return self.folder.role_of(name)

    def handle(self, peer: str, request: Message) -> Answer:
        guest = peer.removeprefix(GUEST_PREFIX) if peer.startswith(GUEST_PREFIX) else None
        if guest is None:
            check_sender("the authority", "Authority", self.role_of(peer), request)
        if isinstance(request, pb.Ping):
            return answered(pb.Pong())
        if isinstance(request, pb.Enroll):
            return answered(self._enroll(peer, guest, request.request))
        if isinstance(request, pb.Withdrawals) and guest is None:
            return answered(pb.Withdrawn(revoked=self.folder.revoked, roster=self.folder.roster()))
        raise ProtocolError(
            f"the authority does not answer {type(request).__name__} requests of guests",
            remedy="join first, with 'isthmus join INVITE'",
        )

    def _enroll(self, peer: str, guest: str | None, request: bytes) -> pb.Enrolled:
        if guest is None:
            certificate = self.folder.renew(peer, request)
            log.info("%s has a new certificate", peer)
        else:
            certificate = self.folder.enroll(guest, request)
            log.info("%s has joined", common_name(x509.load_pem_x509_certificate(certificate)))
        return pb.Enrolled(
            certificate=certificate,
            authority=self.folder.certificate,
            revoked=self.folder.revoked,
            recipe=self.folder.recipe_path.read_text(encoding="utf-8-sig"),
        )
