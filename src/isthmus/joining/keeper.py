"""What keeps a party's certificate: the list of revoked ones is fetched, and a new key and certificate in time."""

from __future__ import annotations

import datetime
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import Message

from isthmus.errors import IsthmusError
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.storage.files import writing
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import CLOCK_SLACK, private_pem, signing_request
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import CERTIFICATE, KEY, REVOKED, ROSTER, Identity, Role, replace_certificate, save_identity

CONTACT = "authority.json"
"""In a party's folder: where its authority answers."""
MIN_SECONDS = 0.2
LOCAL_SECONDS, REMOTE_SECONDS = 1.0, 10.0
"""Time between two looks at the authority: in a folder of this machine, over the network."""
RENEWAL = 1 / 3
"""Share of a certificate's life that is left when a new one is asked for."""
REACH_SECONDS = 10.0
"""Seconds to reach the authority."""
log = logging.getLogger(__name__)


class AuthoritySource(Protocol):
    """An authority, as a party sees it."""

    @property
    def seconds(self) -> float:
        """Time between two looks."""
        ...

    def lists(self) -> pb.Withdrawn:
        """The signed lists of revoked certificates, and of silos that were added."""
        ...

    def renew(self, request: bytes) -> bytes:
        """A PEM certificate for a signing request."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """The authority's folder on this machine."""

    folder: AuthorityFolder
    name: str
    seconds: float = LOCAL_SECONDS

    def lists(self) -> pb.Withdrawn:
        return pb.Withdrawn(revoked=self.folder.revoked, roster=self.folder.roster())

    def renew(self, request: bytes) -> bytes:
        return self.folder.renew(self.name, request)


@dataclass(frozen=True)
class NetworkSource:
    """An authority that is reached over the network, as the party's file ``CONTACT`` says."""

    certificates: Path
    name: str
    role: Role
    seconds: float = REMOTE_SECONDS

    def lists(self) -> pb.Withdrawn:
        return self._ask(pb.Withdrawals())  # type: ignore[no-any-return]

    def renew(self, request: bytes) -> bytes:
        answer: pb.Enrolled = self._ask(pb.Enroll(request=request))
        return bytes(answer.certificate)

    def _ask(self, request: Message) -> Any:
        contact = json.loads((self.certificates / self.name / CONTACT).read_text(encoding="utf-8"))
        identity = Identity.load(self.certificates, self.name, self.role)
        channel = GrpcChannel(
            contact["address"], "Authority", identity, server=contact["server"], deadline=REACH_SECONDS
        )
        with closing(channel):
            return channel.call(request)


class CertificateKeeper:
    """Keeps the certificate of one party fresh, in a thread.

    Args:
        certificates: the folder with the party's folder.
    """

    def __init__(self, certificates: Path, name: str, source: AuthoritySource) -> None:
        self._place, self._name, self._source = certificates / name, name, source
        self._over = threading.Event()

    def look(self) -> None:
        """Fetch what the authority lists, and a new certificate if it is time.

        Raises:
            IsthmusError: the authority cannot be reached, or refuses.
        """
        lists = self._source.lists()
        for name, data in ((REVOKED, lists.revoked), (ROSTER, lists.roster)):
            file = self._place / name
            if data and (not file.exists() or file.read_bytes() != data):
                with writing(file) as temporary:
                    temporary.write_bytes(data)
        if self.due():
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._source.renew(signing_request(key))
            replace_certificate(self._place, certificate, private_pem(key))
            log.info("the certificate of %s was renewed", self._name)

    def due(self) -> bool:
        """Whether little is left of the certificate's life."""
        left, life = self._life()
        return left < RENEWAL * life

    def _life(self) -> tuple[datetime.timedelta, datetime.timedelta]:
        """What is left of the certificate's life, and all of it."""
        read = x509.load_pem_x509_certificate((self._place / CERTIFICATE).read_bytes())
        begin, end = read.not_valid_before_utc + CLOCK_SLACK, read.not_valid_after_utc
        return end - datetime.datetime.now(datetime.UTC), end - begin

    def _pause(self) -> float:
        """Seconds to the next look: several fit into what is left when a certificate of any length is due."""
        with suppress(OSError, ValueError):
            return min(self._source.seconds, max(MIN_SECONDS, RENEWAL * self._life()[1].total_seconds() / 8))
        return self._source.seconds

    def run(self) -> None:
        """Look again and again until ``stop``."""
        failed = ""
        while not self._over.wait(self._pause()):
            try:
                self.look()
                failed = ""
            except (IsthmusError, OSError, ValueError, LookupError, TypeError) as error:
                told = error.message if isinstance(error, IsthmusError) else str(error)
                if told != failed:
                    log.warning("the certificate of %s is not kept: %s", self._name, told)
                failed = told

    def stop(self) -> None:
        """End ``run``."""
        self._over.set()


@contextmanager
def kept_certificate(
    certificates: Path, name: str, role: Role, authority: AuthorityFolder | None = None
) -> Iterator[None]:
    """Within the block, keep the certificate of this party, if its authority is known.

    Args:
        authority: on this machine. A party without a certificate gets one of it.
    """
    place = certificates / name
    source: AuthoritySource
    if authority is not None:
        if not (place / KEY).exists():
            save_identity(authority.issue(name), certificates)
        source = FolderSource(authority, name)
    elif (place / CONTACT).exists():
        source = NetworkSource(certificates, name, role)
    else:
        yield
        return
    keeper = CertificateKeeper(certificates, name, source)
    with suppress(IsthmusError, OSError, ValueError, LookupError, TypeError):  # ``run`` says so
        keeper.look()
    thread = threading.Thread(target=keeper.run, name=f"certificate of {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        keeper.stop()
