"""The root's signature of a version: good for one version of one run, by the root or the trunk's own server."""

from __future__ import annotations

import pytest

from isthmus.errors import IdentityError, ProtocolError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.published import sign_version, verify_version

AUTHORITY = Authority()
TRUNK, ROOT = AUTHORITY.issue("trunk"), AUTHORITY.issue("root")


@pytest.mark.parametrize("signer", [ROOT, TRUNK], ids=["root", "the trunk's own server"])
def test_what_the_root_signed_is_believed(signer: object) -> None:
    shown = sign_version(signer, "run", 3)  # type: ignore[arg-type]
    verify_version(TRUNK, shown, "run", 3)
    for run, version in (("run", 4), ("run", 2), ("other", 3), ("run\x003", 3)):
        with pytest.raises(IdentityError):
            verify_version(TRUNK, shown, run, version)


def test_another_trunks_certificate_does_not_count() -> None:
    with pytest.raises(IdentityError):
        verify_version(TRUNK, sign_version(AUTHORITY.issue("trunk"), "run", 3), "run", 3)


@pytest.mark.parametrize("shown", [pb.Published(), pb.Published(certificate=ROOT.certificate)])
def test_nothing_shown_is_named(shown: pb.Published) -> None:
    with pytest.raises(ProtocolError, match="version 3 without the root's signature") as caught:
        verify_version(TRUNK, shown, "run", 3)
    assert caught.value.remedy
