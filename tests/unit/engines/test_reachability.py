"""Whether servers are reached: each thing between a party and its server that may be wrong is named in words."""

from __future__ import annotations

import base64
import socket
import threading
import time
import types
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines import reachability
from isthmus.engines.reachability import (
    CLOCK_SECONDS,
    Finding,
    Reached,
    ServerPlace,
    clock_finding,
    reach,
    servers_of,
    shown_certificate,
)
from isthmus.errors import CutMovedError
from isthmus.joining.join import join_federation
from isthmus.joining.keeper import CONTACT
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.trunk import service as trunk_service
from isthmus.wire import authority as authority_module
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Answer, answered
from isthmus.wire.identity import REVOKED, Identity, save_identity
from isthmus.wire.server import Server
from tests.conftest import make_recipe
from tests.integration.processes import free_port
from tests.unit.joining.test_join import Coordinator, rows, shifted
from tests.unit.wire.test_client import Proxy, no_proxies  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("no_proxies")


@pytest.fixture(scope="module")
def leader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path_factory.mktemp("federation") / "leader")
    with made.serving():
        yield made


@pytest.fixture(scope="module")
def recipe(leader: Coordinator, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """That of a silo which has joined."""
    folder = tmp_path_factory.mktemp("silo")
    return Recipe.read(join_federation(leader.authority.invite("north"), folder / "north", rows(folder)).recipe)


class Alone:
    """A party of an authority, and servers with other certificates."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority()
        save_identity(self.authority.issue("a"), folder)
        self.recipe = make_recipe(Path("none"), wire={"certificates": str(folder), "deadline": 2.0})

    @contextmanager
    def serving(self, identity: Identity, service: Any = None) -> Iterator[str]:
        server = Server({"Trunk": service}, identity, {"Trunk": ["a"]}, "localhost:0", 2**20)
        server.start()
        yield f"localhost:{server.port}"
        server.stop(0)

    def reach(self, address: str, hello: pb.Hello | None = None) -> Reached:
        return reach(self.recipe, ServerPlace("trunk", address, "Trunk"), "a", "silo", hello)


@pytest.fixture
def alone(tmp_path: Path) -> Alone:
    return Alone(tmp_path)


def failure(reached: Reached) -> Finding:
    """The one failed finding, which is the last."""
    assert [one.state == "failed" for one in reached.findings] == [False] * (len(reached.findings) - 1) + [True]
    assert reached.findings[-1].remedy
    return reached.findings[-1]


def hello_to(recipe: Recipe) -> pb.Hello:
    return greeting(Checkpoint(recipe.model.path), recipe)


def test_a_server_that_is_reached_is_alike_and_on_time(recipe: Recipe) -> None:
    for place in servers_of(recipe, "north", "silo"):
        found = reach(recipe, place, "north", "silo", hello_to(recipe))
        assert {one.state for one in found.findings} == {"ok"}, found.findings
        assert len(found.findings) == 5
        assert found.pong is not None
        assert found.pong.welcome.completed == 0


def test_every_replica_of_the_trunk_is_reached(recipe: Recipe) -> None:
    replicas = ("b.example.org:1", "c.example.org:1")
    trunk = recipe.trunk.model_copy(update={"replicas": replicas})
    places = servers_of(recipe.model_copy(update={"trunk": trunk}), "north", "silo")
    assert [one.address for one in places if one.name == "trunk"] == [recipe.trunk.address, *replicas]


def test_the_authority_is_asked_for_if_it_is_elsewhere(recipe: Recipe, tmp_path: Path) -> None:
    assert [(one.name, one.service) for one in servers_of(recipe, "north", "silo")] == [
        ("trunk", "Trunk"),
        ("root", "Root"),
    ]
    own = recipe.model_copy(update={"wire": recipe.wire.model_copy(update={"certificates": str(tmp_path)})})
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / CONTACT).write_text('{"address": "a.example.org:1", "server": "authority"}')
    elsewhere = servers_of(own, "north", "silo")[-1]
    assert elsewhere == ServerPlace("authority", "a.example.org:1", "Authority")


def test_an_authority_is_asked_for_its_answer_alone(recipe: Recipe) -> None:
    place = ServerPlace("trunk", recipe.trunk.address, "Authority")
    found = reach(recipe, place, "north", "silo", hello_to(recipe))
    assert [(one.check, one.state) for one in found.findings] == [
        ("authority", "ok"),
        ("authority, TLS", "ok"),
        ("authority, answer", "ok"),
    ]


def test_an_edge_and_its_silos_have_their_own_servers(tmp_path: Path) -> None:
    edges = [
        {"name": "left", "address": "left.org:1", "silos": ["a"], "sibling": "right"},
        {"name": "right", "address": "right.org:1", "silos": ["b"]},
    ]
    recipe = make_recipe(tmp_path, silos=("a", "b"), edge=edges, wire={"certificates": str(tmp_path)})
    assert [one.name for one in servers_of(recipe, "a", "silo")] == ["trunk", "left", "right"]
    assert [one.name for one in servers_of(recipe, "b", "silo")] == ["trunk", "right"]
    assert [one.name for one in servers_of(recipe, "left", "edge")] == ["root"]
    assert not servers_of(recipe, "trunk", "trunk")


def test_a_recipe_that_differs_is_named_by_its_key(recipe: Recipe) -> None:
    other = recipe.model_copy(update={"seed": 99})
    found = failure(reach(recipe, servers_of(recipe, "north", "silo")[0], "north", "silo", hello_to(other)))
    assert "seed = 99" in found.words


def test_who_is_revoked_is_told_when(leader: Coordinator, tmp_path: Path) -> None:
    joined = join_federation(leader.authority.invite("south"), tmp_path / "south", rows(tmp_path))
    own = Recipe.read(joined.recipe)
    leader.authority.revoke("south")
    trunk = Path(leader.recipe.wire.certificates) / "trunk"
    (trunk / REVOKED).write_bytes(leader.authority.revoked)  # as its process does every second
    found = failure(reach(own, servers_of(own, "south", "silo")[0], "south", "silo", None))
    assert "revoked on" in found.words


def test_a_name_that_nobody_knows(alone: Alone) -> None:
    found = failure(alone.reach("trunk.invalid:7001"))
    assert "trunk.invalid is not known here" in found.words


def test_a_port_at_which_nothing_listens(alone: Alone) -> None:
    address = f"localhost:{free_port()}"
    assert f"nothing listens at {address}" in failure(alone.reach(address)).words


def test_a_server_that_does_not_answer(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "REACH_LIMIT", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        found = failure(alone.reach(f"127.0.0.1:{silent.getsockname()[1]}"))
    assert "not as a server of isthmus does" in found.words


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_another_program_at_the_port(alone: Alone, said: bytes) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=_say, args=(listener, said), daemon=True).start()
        found = failure(alone.reach(f"127.0.0.1:{listener.getsockname()[1]}"))
    assert "not as a server of isthmus does" in found.words


def _say(listener: socket.socket, said: bytes) -> None:
    with suppress(OSError):
        while True:
            opened, _ = listener.accept()
            with opened:
                opened.sendall(said)
                opened.recv(4096)


def test_a_server_of_another_authority(alone: Alone) -> None:
    with alone.serving(Authority().issue("trunk")) as address:
        assert "another authority" in failure(alone.reach(address)).words


def test_a_server_of_another_name(alone: Alone) -> None:
    with alone.serving(alone.authority.issue("root")) as address:
        assert f"the server at {address} is root, trunk is needed" in failure(alone.reach(address)).words


def test_a_server_whose_certificate_expired(alone: Alone) -> None:
    with alone.serving(alone.authority.issue("trunk", days=-1)) as address:
        found = failure(alone.reach(address))
    assert "expired on" in found.words
    assert "by this machine's clock" in found.words


def test_a_clock_that_is_slow_sees_a_certificate_that_is_not_valid_yet(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "datetime", shifted(2.0))
        ahead = alone.authority.issue("trunk")
    with alone.serving(ahead) as address:
        found = failure(alone.reach(address))
    assert "is valid from" in found.words
    assert "set this machine's clock right" in found.remedy


class Earlier:
    """A server of a version that compares nothing."""

    def handle(self, peer: str, request: object) -> Answer:
        return answered(pb.Pong())


def test_an_earlier_version_is_said_to_be_one(alone: Alone, recipe: Recipe) -> None:
    with alone.serving(alone.authority.issue("trunk"), Earlier()) as address:
        found = alone.reach(address, hello_to(recipe))
    assert found.findings[-1].state == "warning"
    assert "earlier version" in found.findings[-1].words
    assert found.pong is None


class Moved(Earlier):
    """A server whose cut has moved since the party's recipe was written."""

    def handle(self, peer: str, request: object) -> Answer:
        if isinstance(request, pb.Ping) and request.HasField("compared"):
            raise CutMovedError("one of them is behind", remedy="wait")
        return super().handle(peer, request)


def test_a_cut_that_has_moved_is_no_failure_of_who_follows_it(alone: Alone, recipe: Recipe) -> None:
    with alone.serving(alone.authority.issue("trunk"), Moved()) as address:
        found = alone.reach(address, hello_to(recipe))
    assert (found.findings[-1].state, found.findings[-1].words) == ("warning", "one of them is behind")
    assert found.pong is None


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_a_clock_that_differs_is_worth_a_warning(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    monkeypatch.setattr(trunk_service, "time", types.SimpleNamespace(time=lambda: time.time() + ahead))
    found = reach(recipe, servers_of(recipe, "north", "silo")[0], "north", "silo", hello_to(recipe))
    (warned,) = (one for one in found.findings if one.state == "warning")
    assert warned.words == f"3,600 s {'ahead of' if ahead > 0 else 'behind'} this machine's"


@given(st.floats(min_value=-1e9, max_value=1e9))
def test_clocks_are_judged_by_their_difference_and_the_certificate(difference: float) -> None:
    own = OWN.issue("a", days=10)
    found = clock_finding(ServerPlace("trunk", "t:1", "Trunk"), difference, own)
    if -3600 < difference < 10 * 86400 - 60:
        assert found.state == ("ok" if abs(difference) <= CLOCK_SECONDS else "warning")
    elif not -3700 < difference < 10 * 86400 + 60:
        assert found.state == "failed"


OWN = Authority()


def test_the_proxy_is_taken_and_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(recipe.trunk.address.rpartition(":")[2])
    with closing(Proxy(port)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        place = ServerPlace("trunk", f"trunk.example.org:{port}", "Trunk")
        found = reach(recipe, place, "north", "silo", hello_to(recipe))
        assert {one.state for one in found.findings} == {"ok"}, found.findings
        assert f"through the proxy {proxy.address} (from http_proxy)" in found.findings[0].words
        assert set(proxy.asked) == {place.address}


class Refusing:
    """A proxy that answers so, and keeps what it was asked."""

    def __init__(self, status: bytes) -> None:
        self.asked: list[bytes] = []
        self._status = status
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                opened, _ = self._listener.accept()
                with opened:
                    self.asked.append(opened.recv(4096))
                    opened.sendall(self._status)


@pytest.mark.parametrize(
    ("status", "login", "told"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "", "wants credentials (407)"),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "me:p%40ss@", "refuses the name and password"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "", "does not connect to trunk.example.org:7001 (403 Forbidden)"),
        (b"", "", "does not connect to trunk.example.org:7001 (no answer)"),
    ],
)
def test_a_proxy_that_refuses_is_named(
    alone: Alone, monkeypatch: pytest.MonkeyPatch, status: bytes, login: str, told: str
) -> None:
    with closing(Refusing(status)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{login}{proxy.address}")
        found = failure(alone.reach("trunk.example.org:7001"))
        assert told in found.words
        assert "p@ss" not in found.words + found.remedy
        secret = base64.b64encode(b"me:p@ss")
        assert (b"Proxy-Authorization: Basic " + secret in proxy.asked[0]) is bool(login)


def test_a_certificate_can_be_looked_at_without_trust(alone: Alone) -> None:
    with alone.serving(Authority().issue("root")) as address:
        assert "root" in shown_certificate(address).subject.rfc4514_string()
