"""A whole federation in one process, for Flower's simulation: trunk, root and silos behind one socket.

``python -m isthmus.engines.flower.simulated RECIPE RUN_DIR SOCKET``, which the app of ``isthmus flower --simulation``
starts. The silos are threads: each keeps its model, its rows and its place between messages, whichever of Ray's
processes brings them, and hundreds of small ones fit one machine.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path

from isthmus.engines.certificates import has_certificates, make_certificates
from isthmus.engines.flower.app import check_carried
from isthmus.engines.flower.courier.letters import Letter
from isthmus.engines.flower.root_end import RootEnd
from isthmus.engines.flower.silo_end import LINGER_SECONDS, FlowerChannel, listening
from isthmus.engines.lifetime import Stopped, stoppable
from isthmus.engines.local import at_address, create_run, open_resumed
from isthmus.engines.process import LISTENING
from isthmus.engines.roles import start_server
from isthmus.engines.threads import set_threads, share_cores
from isthmus.errors import IsthmusError
from isthmus.federation.aggregator import GreetedAggregator
from isthmus.model.agreement import hello_of
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.identity import Identity

log = logging.getLogger(__name__)


def simulate(run: RunDirectory, socket: Path) -> None:
    """Run the federation of a run directory while a Flower app carries its frames over this socket.

    Raises:
        IsthmusError: a silo failed.
    """
    recipe = run.recipe()
    check_carried(recipe)
    certificates = Path(recipe.wire.certificates)
    if not has_certificates(recipe, certificates):
        make_certificates(recipe, certificates)
    set_threads(recipe)
    server, services = start_server(at_address(recipe, "localhost:0"), run, ("trunk", "root"))
    try:
        there = at_address(recipe, f"localhost:{server.port}")
        channels = {silo.name: _channel(there, silo.name) for silo in recipe.silo}
        identity = Identity.load(certificates, "trunk", "trunk")
        silos = recipe.tree.node(ROOT).children
        limit = recipe.wire.max_frame_bytes
        service = services["Root"]
        assert isinstance(service, GreetedAggregator)
        root = RootEnd(service, identity, silos, limit, speaks=lambda silo: channels[silo].speaks())
        with listening(socket, _Sorting(root, channels).exchange), closing(root):
            print(f"{LISTENING}{socket}", flush=True)
            _train(there, run, channels)
            root.over.wait(LINGER_SECONDS)
    finally:
        server.stop()
        for service in services.values():
            if isinstance(service, TrunkService):
                service.stop()


class _Sorting:
    """Gives each letter to whom it is for."""

    def __init__(self, root: RootEnd, channels: Mapping[str, FlowerChannel]) -> None:
        self._root, self._channels, self._names = root, channels, tuple(channels)

    def exchange(self, letter: Letter) -> Letter:
        if "kind" in letter.head:
            return self._root.exchange(letter)
        number = int(letter.head["partition"])
        if number >= len(self._names):
            told = f"there are {len(self._names)} silos, and this is node {number + 1}: simulate as many nodes as silos"
            return Letter({"refused": told}, (b"",))
        return self._channels[self._names[number]].exchange(letter)


def _channel(recipe: Recipe, silo: str) -> FlowerChannel:
    identity = Identity.load(Path(recipe.wire.certificates), silo, "silo")
    return FlowerChannel(identity, hello_of(recipe.of_silo(silo)), limit=recipe.wire.max_frame_bytes)


def _train(recipe: Recipe, run: RunDirectory, channels: Mapping[str, FlowerChannel]) -> None:
    """Every silo in a thread, until all have finished, or one fails that the others cannot do without."""
    with ThreadPoolExecutor(len(channels)) as threads:
        working = [threads.submit(_work, recipe, run, name, channel) for name, channel in channels.items()]
        done, _ = wait(working, return_when=FIRST_EXCEPTION)
        failed = [one for one in done if one.exception() is not None]
        left = len(working) - len(failed)
        if failed and left < recipe.tree.fewest():
            for channel in channels.values():
                channel.close()
        _raise(failed if left < recipe.tree.fewest() else ())


def _work(recipe: Recipe, run: RunDirectory, name: str, channel: FlowerChannel) -> None:
    try:
        with closing(Worker(recipe, name, run.role(name), root=channel)) as worker:
            worker.run()
        channel.part()
    except BaseException as error:
        log.error("silo %s failed: %s", name, error if isinstance(error, IsthmusError) else type(error).__name__)
        channel.part(type(error).__name__)
        raise


def _raise(failed: list[Future[None]] | tuple[()]) -> None:
    for one in failed:
        one.result()


def run_simulated(arguments: list[str]) -> int:
    """Run or continue a federation; returns the exit code."""
    recipe, run_dir, socket = map(Path, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    share_cores()
    try:
        with stoppable():
            begun = (run_dir / "recipe.toml").exists()
            run = open_resumed(run_dir) if begun else create_run(Recipe.read(recipe), run_dir)
            with run.locked():
                simulate(run, socket)
    except Stopped:
        return 130
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_simulated(sys.argv[1:]))
