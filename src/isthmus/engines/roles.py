"""One role in this process: trunk, root, both at one port, or a silo."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from isthmus.federation.root import RootService
from isthmus.recipe import Recipe
from isthmus.report.record import RunDirectory, writing
from isthmus.silo.worker import Worker
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import Service
from isthmus.wire.identity import Authority, Identity, save
from isthmus.wire.server import Server

ADDRESS = "address"
"""File in a server's folder of the run directory that holds ``host:port`` while it listens."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop (SIGINT or SIGTERM)."""


def serve(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...]) -> None:
    """Serve ``trunk``, ``root`` or both until stopped. The first role's address and certificate are used."""
    set_threads(recipe)
    with stoppable():
        server, services = start_server(recipe, run, roles)
        try:
            threading.Event().wait()
        finally:
            server.stop()
            for service in services.values():
                if isinstance(service, TrunkService):
                    service.stop()


def start_server(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...]) -> tuple[Server, dict[str, Service]]:
    """Build the services, listen, and write the address down for who looks for it."""
    identity = Identity.load(Path(recipe.wire.certificates), roles[0])
    services: dict[str, Service] = {}
    if "trunk" in roles:
        services["Trunk"] = TrunkService(recipe, run.role("trunk"))
    if "root" in roles:
        services["Root"] = RootService(recipe, run.role("root"))
    address = recipe.trunk.address if roles[0] == "trunk" else recipe.root.address
    names = tuple(silo.name for silo in recipe.silo)
    server = Server(services, identity, names, address, recipe.wire.max_frame_bytes)
    server.start()
    host = address.rpartition(":")[0]
    for role in roles:
        with writing(run.role(role).path / ADDRESS) as temporary:
            temporary.write_text(f"{host}:{server.port}")
    return server, services


def work(recipe: Recipe, run: RunDirectory, name: str) -> None:
    """Be one silo until the federation is finished."""
    set_threads(recipe)
    with stoppable():
        worker = Worker(recipe, name, run.role(name))
        try:
            worker.run()
        finally:
            worker.close()


def make_certificates(recipe: Recipe, folder: Path) -> None:
    """Certificates for every party of a recipe, by one new authority whose key is then forgotten."""
    authority = Authority()
    shared = recipe.trunk.address == recipe.root.address
    save(authority.issue("trunk", also=("root",) if shared else ()), folder)
    save(authority.issue("root"), folder)
    for silo in recipe.silo:
        save(authority.issue(silo.name), folder)


def set_threads(recipe: Recipe) -> None:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT raise ``Stopped`` in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
