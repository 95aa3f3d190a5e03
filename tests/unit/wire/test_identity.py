"""Identities on disk, and who may talk to whom over real sockets: whoever is refused reaches no service."""

from __future__ import annotations

import dataclasses
import datetime
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.errors import IdentityError, IsthmusError, PeerGoneError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity, save_identity
from isthmus.wire.server import METHOD_PATH
from tests.conformance.test_channels import AUTHORITY, HANG, Echo, ask, joined, number, serving

FILES = ("ca.pem", "cert.pem", "key.pem")
FOREIGN = Authority()
HELLO = frames.wrap(pb.Ping()).SerializeToString()
Stream = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


class Forwarder:
    """TCP from a port of its own to a server's; connections can be cut while both ends live, and bytes held back."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("localhost", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._left = -1
        self.passing = True
        self.turned_away = 0
        self.rate = 0.0
        """Bytes that pass each way in a second; 0: any number."""
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        opened, self._open = self._open, []
        for end in opened:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut_after(self, size: int) -> None:
        """Cut when this many more bytes have gone to the server."""
        self._left = size

    def vanish(self) -> None:
        """Hold back every byte both ways from now on, as a host does whose cable is pulled."""
        self._flows.clear()

    def return_again(self) -> None:
        """Pass bytes again, on connections that are made from now on."""
        self.cut()
        self._flows.set()

    def close(self) -> None:
        self.passing = False
        self._flows.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                if not self.passing:
                    self.turned_away += 1
                    near.close()
                    continue
                far = socket.create_connection(("localhost", self._target))
                self._open += [near, far]
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, to_server: bool) -> None:
        with suppress(OSError):
            for end in (source, sink):  # so that what waits for a slow line waits with whoever sends it
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
            while data := source.recv(2**14):
                self._flows.wait()
                if self.rate:
                    time.sleep(len(data) / self.rate)
                sink.sendall(data)
                if to_server and self._left > 0:
                    self._left = max(self._left - len(data), 0)
                    if self._left == 0:
                        self.cut()


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Credentials of a server of this identity, which asks for certificates of its authority."""
    return grpc.ssl_server_credentials([(identity.key, identity.certificate)], identity.authority, True)


@contextmanager
def raw_server(stream: Stream, identity: Identity | None) -> Iterator[int]:
    """A server of ``Trunk`` with this certificate, or none, that answers as ``stream`` does; gives its port."""
    server = grpc.server(ThreadPoolExecutor(4))
    methods = {"Trunk": grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("isthmus.Wire", methods),))
    if identity is None:
        port = server.add_insecure_port("localhost:0")
    else:
        port = server.add_secure_port("localhost:0", server_credentials(identity))
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def raw_client(port: int, *messages: bytes, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """Send these bytes as messages and give the status that the stream ends with."""
    options = (("grpc.ssl_target_name_override", "trunk"),)
    address = f"localhost:{port}"
    opened = grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address)
    with opened as channel:
        call = channel.stream_stream(METHOD_PATH.format("Trunk"), None, None)(iter(messages), timeout=HANG)
        with suppress(grpc.RpcError):
            list(call)
        status: grpc.StatusCode = call.code()
        return status


def refusal(port: int, identity: Identity, *, service: str = "Trunk") -> IsthmusError:
    """The error that joining with this identity ends in."""
    with pytest.raises((IdentityError, PeerGoneError)) as refused:
        GrpcChannel(f"localhost:{port}", service, identity, deadline=0.5)
    assert refused.value.remedy
    return refused.value


def mixed(name: str, *, trusting: Identity, proving: Identity) -> Identity:
    """Trusts the authority of one identity and shows the certificate of another."""
    return Identity(name, trusting.authority, proving.certificate, proving.key)


def nameless() -> bytes:
    """A certificate whose subject is empty."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(x509.Name([]), x509.Name([]), key.public_key(), x509.random_serial_number())
    dated = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    return dated.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    identity = AUTHORITY.issue("a")
    save_identity(identity, tmp_path)
    assert Identity.load(tmp_path, "a", "silo") == identity
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("before", [None, 0o600, 0o644])
def test_only_the_owner_reads_the_key(tmp_path: Path, before: int | None) -> None:
    key = tmp_path / "a" / "key.pem"
    if before is not None:
        key.parent.mkdir()
        key.touch()
        key.chmod(before)
    save_identity(AUTHORITY.issue("a"), tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize("file", FILES)
def test_an_absent_file_is_named(tmp_path: Path, file: str) -> None:
    save_identity(AUTHORITY.issue("a"), tmp_path)
    (tmp_path / "a" / file).unlink()
    with pytest.raises(IdentityError, match=file) as refused:
        Identity.load(tmp_path, "a", "silo")
    assert "isthmus certificates" in refused.value.remedy


def test_a_party_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="no certificate of a"):
        Identity.load(tmp_path, "a", "silo")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n", "half"])
def test_a_damaged_file_is_refused(tmp_path: Path, file: str, content: bytes | str) -> None:
    save_identity(AUTHORITY.issue("a"), tmp_path)
    path = tmp_path / "a" / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(IdentityError, match="damaged") as refused:
        Identity.load(tmp_path, "a", "silo")
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        (AUTHORITY.issue("a", days=-1), "expired on"),
        (dataclasses.replace(AUTHORITY.issue("b"), name="a"), "is b's"),
        (mixed("a", trusting=AUTHORITY.issue("a"), proving=FOREIGN.issue("a")), "another authority"),
        (mixed("a", trusting=FOREIGN.issue("a"), proving=AUTHORITY.issue("a")), "another authority"),
        (dataclasses.replace(AUTHORITY.issue("a"), key=AUTHORITY.issue("a").key), "another key"),
        (dataclasses.replace(AUTHORITY.issue("a"), certificate=nameless()), "another authority, or is damaged"),
    ],
)
def test_a_certificate_that_does_not_fit_is_refused(tmp_path: Path, identity: Identity, told: str) -> None:
    save_identity(identity, tmp_path)
    with pytest.raises(IdentityError, match=told) as refused:
        Identity.load(tmp_path, "a", "silo")
    assert refused.value.remedy


def test_a_party_knows_what_another_one_signed() -> None:
    north, south = AUTHORITY.issue("north"), AUTHORITY.issue("south")
    south.verify("north", north.certificate, north.sign(b"keys"), b"keys")


@pytest.mark.parametrize(
    ("signer", "name", "data", "told"),
    [
        (AUTHORITY.issue("north"), "north", b"other keys", "is not valid for the data"),
        (AUTHORITY.issue("north"), "south", b"keys", "is north's"),
        (FOREIGN.issue("north"), "north", b"keys", "another authority"),
        (AUTHORITY.issue("north", days=-1.0), "north", b"keys", "expired on"),
        (dataclasses.replace(AUTHORITY.issue("north"), certificate=b"x"), "north", b"keys", "damaged"),
        (
            dataclasses.replace(AUTHORITY.issue("north"), key=AUTHORITY.issue("mallory").key),
            "north",
            b"keys",
            "is not valid for the data",
        ),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_what_a_party_did_not_sign_is_refused(signer: Identity, name: str, data: bytes, told: str, known: bool) -> None:
    """To one who has never heard of it, and to one who knows a good certificate of that name."""
    south, good = AUTHORITY.issue("south"), AUTHORITY.issue(name)
    if known:
        south.verify(name, good.certificate, good.sign(b"keys"), b"keys")
    for _ in range(2):
        with pytest.raises(IdentityError, match=told):
            south.verify(name, signer.certificate, signer.sign(b"keys"), data)


def test_a_known_certificate_ends_when_it_says() -> None:
    south, north = AUTHORITY.issue("south"), AUTHORITY.issue("north", days=2 / 86_400)
    south.verify("north", north.certificate, north.sign(b"keys"), b"keys")
    time.sleep(2.1)
    with pytest.raises(IdentityError, match="expired on"):
        south.verify("north", north.certificate, north.sign(b"keys"), b"keys")


def test_parties_of_one_authority_talk() -> None:
    with serving({"Trunk": Echo(), "Root": Echo()}) as server:
        for service in ("Trunk", "Root"):
            with closing(joined(server.port, service=service)) as channel:
                assert ask(channel, number(1)) == number(1)


@pytest.mark.parametrize("name", ["c", "trunk", "root", "A", ""])
def test_a_certified_name_that_the_recipe_does_not_list(name: str) -> None:
    service = Echo()
    certified = AUTHORITY.issue(name or "a b", "silo")
    with serving({"Trunk": service}) as server:
        error = refusal(server.port, certified)
    assert isinstance(error, IdentityError)
    assert "may not connect to this trunk" in error.message
    assert not service.requests


OURS = AUTHORITY.issue("a")
THEIRS = FOREIGN.issue("a")


@pytest.mark.parametrize(
    "identity",
    [
        THEIRS,
        mixed("a", trusting=OURS, proving=THEIRS),
        mixed("a", trusting=THEIRS, proving=OURS),
        AUTHORITY.issue("a", days=-1),
    ],
    ids=["foreign", "foreign certificate", "foreign trust", "expired"],
)
def test_a_client_that_proves_nothing(identity: Identity) -> None:
    service = Echo()
    with serving({"Trunk": service}) as server:
        refusal(server.port, identity)
        with closing(joined(server.port)) as other:
            assert ask(other, number(1)) == number(1)
    assert service.requests == [pb.Ping(), number(1)]


@pytest.mark.parametrize(
    "credentials", [grpc.ssl_channel_credentials(OURS.authority), None], ids=["no certificate", "plaintext"]
)
def test_a_client_without_a_certificate(credentials: grpc.ChannelCredentials | None) -> None:
    service = Echo()
    with serving({"Trunk": service}) as server:
        assert raw_client(server.port, HELLO, credentials=credentials) is grpc.StatusCode.UNAVAILABLE
    assert not service.requests


@pytest.mark.parametrize(
    ("identity", "kind"),
    [
        (None, IsthmusError),
        (AUTHORITY.issue("b"), IdentityError),
        (AUTHORITY.issue("root"), IdentityError),
        (FOREIGN.issue("trunk"), IdentityError),
        (AUTHORITY.issue("trunk", days=-1), IdentityError),
    ],
    ids=["plaintext", "a silo", "the root", "a foreign trunk", "an expired trunk"],
)
def test_a_server_that_is_not_the_trunk_hears_nothing(identity: Identity | None, kind: type[IsthmusError]) -> None:
    heard: list[bytes] = []

    def stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        heard.extend(requests)
        yield frames.wrap(pb.Pong()).SerializeToString()

    with raw_server(stream, identity) as port:
        assert isinstance(refusal(port, OURS), kind)
    assert not heard


def test_the_trunk_is_not_the_root() -> None:
    with serving({"Root": Echo()}, identity=AUTHORITY.issue("trunk")) as server:
        assert isinstance(refusal(server.port, OURS, service="Root"), IdentityError)
