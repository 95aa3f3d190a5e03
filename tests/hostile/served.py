"""Servers of a recipe as 'isthmus trunk', 'isthmus root' and 'isthmus edge' start them, with real certificates.

Whoever has a certificate of the federation connects to them over gRPC.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from isthmus.engines.roles import start_edge, start_server
from isthmus.model.agreement import hello_of
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.join import greeting
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity, Role, save_identity
from isthmus.wire.server import Server
from tests.conftest import make_recipe
from tests.unit.wire.test_server import free_port

WAIT = 30.0
SERVICE = {"trunk": "Trunk", "root": "Root", "moves": "Moves"}
"""By server, its service; ``moves`` is the trunk's second one, where the recipe moves the cut."""


class Served:
    """Trunk, root and edges in servers of their own, with the certificates of one authority.

    Args:
        together: one server is both, with the trunk's certificate.
    """

    def __init__(self, model: Path, folder: Path, /, *, together: bool = False, **recipe: Any) -> None:
        self.authority = Authority()
        certificates = folder / "certificates"
        self.recipe: Recipe = make_recipe(
            model,
            wire={"certificates": str(certificates)} | recipe.pop("wire", {}),
            **{role: {"address": f"localhost:{free_port()}"} | recipe.pop(role, {}) for role in ("trunk", "root")},
            **recipe,
        )
        self.run = RunDirectory.create(folder / "run", self.recipe)
        self.own: dict[str, Identity] = {}
        for name in ("trunk", "root", *(silo.name for silo in self.recipe.silo)):
            self.own[name] = self.authority.issue(name)
            save_identity(self.own[name], certificates)
        for name in self.recipe.tree.edges:
            self.own[name] = self.authority.issue(name, "edge")
            save_identity(self.own[name], certificates)
        self._opened = ExitStack()
        self.servers: dict[str, Server] = {}
        self.services: dict[str, Any] = {}
        """By gRPC service; those of edges by the edge's name."""
        for roles in [("trunk", "root")] if together else [("trunk",), ("root",)]:
            server, services = start_server(self.recipe, self.run, roles)
            self._opened.callback(server.stop, 0)
            self.servers |= dict.fromkeys((*roles, *(["moves"] if "Moves" in services else [])), server)
            self.services |= services
        self._opened.callback(self.services["Trunk"].stop)
        for name in self.recipe.tree.edges:  # a parent comes before its children in these recipes
            self.servers[name], self.services[name], above = start_edge(self.recipe, self.run, name)
            self._opened.callback(self.servers[name].stop, 0)
            self._opened.callback(above.close)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def certified(self, server: str) -> str:
        """The name on a server's certificate."""
        return "trunk" if self.servers[server] is self.servers["trunk"] else server

    def hello(self, server: str, instance: str = "") -> pb.Hello:
        known = Checkpoint(self.recipe.model.path)
        hello = greeting(known, self.recipe) if server == "trunk" else hello_of(self.recipe)
        hello.instance = instance or hello.instance
        return hello

    def channel(self, server: str, identity: Identity | str, greeting: Message | None = None) -> GrpcChannel:
        """A channel of this party to trunk or root, greeted as its silos do."""
        identity = self.own[identity] if isinstance(identity, str) else identity
        made = GrpcChannel(
            f"localhost:{self.servers[server].port}",
            SERVICE.get(server, "Root"),
            identity,
            server=self.certified(server),
            greeting=greeting or (pb.Ping() if server == "moves" else self.hello(server)),
            deadline=WAIT,
            limit=self.recipe.wire.max_frame_bytes,
        )
        self._opened.callback(made.close)
        return made

    def issue(self, name: str, role: Role) -> Identity:
        return self.authority.issue(name, role)
