"""One role in this process: trunk, root, both at one port, an edge, or a silo."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from isthmus.engines.lifetime import Stopped
from isthmus.engines.process import LISTENING
from isthmus.engines.threads import set_threads
from isthmus.errors import RecipeError
from isthmus.federation.aggregator import GreetedAggregator, edge_service, root_service
from isthmus.model.agreement import hello_of
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import Service
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity
from isthmus.wire.server import Server


def serve_roles(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...]) -> None:
    """Serve ``trunk``, ``root`` or both until ``Stopped``.

    Args:
        roles: the first one's address and certificate are used for both.

    Raises:
        RecipeError: two roles, but the recipe has them at two addresses.
    """
    if len({getattr(recipe, role).address for role in roles}) > 1:
        raise RecipeError(
            f"the trunk is at {recipe.trunk.address}, the root at {recipe.root.address}: one process has one address",
            remedy="give both the same address in the recipe, or start the root by 'isthmus root'",
        )
    set_threads(recipe)
    with suppress(Stopped):
        server, services = start_server(recipe, run, roles)
        try:
            _listen(server, getattr(recipe, roles[0]).address)
        finally:
            for service in services.values():
                if isinstance(service, TrunkService):
                    service.stop()


def serve_edge(recipe: Recipe, run: RunDirectory, name: str) -> None:
    """Serve the edge ``name`` until ``Stopped``."""
    node = recipe.tree.node(name)
    set_threads(recipe)
    with suppress(Stopped):
        identity = Identity.load(Path(recipe.wire.certificates), name)
        parent = recipe.tree.parent(name)
        wire, above = recipe.wire, recipe.tree.node(parent).address
        channel = GrpcChannel(
            above,
            "Root",
            identity,
            server=parent,
            greeting=hello_of(recipe),
            deadline=wire.deadline,
            limit=wire.max_frame_bytes,
        )
        service = GreetedAggregator(recipe, name, edge_service(recipe, name, run.edge(name), channel, identity))
        peers = {"Root": (*node.children, *node.wards)}
        server = Server({"Root": service}, identity, peers, node.address, wire.max_frame_bytes)
        server.start()
        try:
            _listen(server, node.address)
        finally:
            channel.close()


def _listen(server: Server, address: str) -> None:
    """Print the server's address and wait for ``Stopped``; then stop the server."""
    try:
        print(f"{LISTENING}{address.rpartition(':')[0]}:{server.port}", flush=True)
        threading.Event().wait()
    finally:
        server.stop()


def start_server(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...]) -> tuple[Server, dict[str, Service]]:
    """Start a server with these roles' services, at the first role's address and with its certificate.

    Returns:
        The server, and its services by gRPC service name (``Trunk``, ``Root``).
    """
    identity = Identity.load(Path(recipe.wire.certificates), roles[0])
    services: dict[str, Service] = {}
    peers: dict[str, Collection[str]] = {}
    if "trunk" in roles:
        services["Trunk"] = trunk = TrunkService(recipe, run.role("trunk"))
        peers["Trunk"] = [silo.name for silo in recipe.silo]
        if run.role("root").path.exists():  # one run directory: the trunk's adapter must be of the root's round
            trunk.restore(run.completed())
    if "root" in roles:
        services["Root"] = GreetedAggregator(recipe, ROOT, root_service(recipe, run.role("root"), identity))
        peers["Root"] = recipe.tree.node(ROOT).children
    address = getattr(recipe, roles[0]).address
    server = Server(services, identity, peers, address, recipe.wire.max_frame_bytes)
    server.start()
    return server, services


def run_silo(recipe: Recipe, run: RunDirectory, name: str) -> None:
    """Run the silo ``name`` until the federation has finished."""
    set_threads(recipe)
    worker = Worker(recipe, name, run.role(name))
    try:
        worker.run()
    finally:
        worker.close()
