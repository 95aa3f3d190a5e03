"""One role in this process: trunk, root, both at one port, an edge, or a silo."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import isthmus
from isthmus.data.examples import check_examples
from isthmus.engines.flower.app import check_carried
from isthmus.engines.flower.root_end import carried
from isthmus.engines.flower.silo_end import FlowerChannel, at_socket
from isthmus.engines.growth import Growth
from isthmus.engines.lifetime import Stopped, by_engine
from isthmus.engines.local import at_address
from isthmus.engines.memory import return_memory
from isthmus.engines.monitor import Monitor
from isthmus.engines.moving import RootMoves, SiloMoves, TrunkMoves, check_moves_apart, finished, recorded_cut
from isthmus.engines.process import LISTENING
from isthmus.engines.threads import set_threads
from isthmus.errors import CutMovedError, RecipeError, RunError
from isthmus.federation.aggregator import GreetedAggregator, edge_service, root_service
from isthmus.federation.rounds import Aggregator
from isthmus.joining.authority_folder import OWN_SERVER, AuthorityFolder
from isthmus.joining.doorkeeper import AuthorityService
from isthmus.joining.keeper import kept_certificate
from isthmus.joining.model_files import ModelFiles
from isthmus.model.agreement import hello_of
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.silo.worker import Worker
from isthmus.storage.files import private_folder
from isthmus.storage.record import RunDirectory
from isthmus.trunk.ranks import Ranks
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import Channel, Service
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity, Role
from isthmus.wire.server import Server

log = logging.getLogger(__name__)
AWAY_SECONDS = 86_400.0
"""Time for which a server keeps its answers for a party without a connection, unless an engine started both: such a
party waits until its server is there again, and would have to be started again without them."""
LOOK_SECONDS = 1.0
"""Time between two looks whether the federation has finished, and between two returns of memory."""


@dataclass(frozen=True)
class Serving:
    """How trunk and root are served, beside what the recipe says."""

    number: int | None = None
    """The round whose adapter the trunk serves; None: the last one that is saved."""
    authority: AuthorityFolder | None = None
    """Answers guests here; None: nobody does."""
    monitor: Monitor | None = None
    """Tells of the roles."""
    flower: Path | None = None
    """The socket at which the root answers a Flower app, too."""
    replica: bool = False
    """Whether the trunk is one of several of a finished run (see ``TrunkService``)."""
    ranks: Ranks | None = None
    """The processes that hold the trunk's weights with this one; None: it holds them alone."""


BY_RECIPE = Serving()
"""The last round, to the parties of the recipe."""


def recorded(path: Path, recipe: Recipe, run_dir: Path, silo: str | None = None) -> RunDirectory:
    """The run directory of a role. The recipe is written there, so that the result can be used later.

    Args:
        path: the recipe's file. If it is the run directory's own, it stays as it is.
        recipe: the recipe as it is run.
        silo: the silo that is to run, whose rows are checked before anything is written; None: another role.

    Raises:
        DataError: a row or file of the silo cannot be used; all of them are counted.
        RecipeError: the recipe divides one set among silos, and so is a simulation; or it moves the cut, and has edges.
        RunError: the directory holds a run whose adapters have other shapes or another start.
    """
    run = RunDirectory(run_dir.resolve())
    if path.resolve() != run.recipe_path:
        if recipe.partition is not None:
            raise RecipeError(
                "[partition] divides one set among silos that all read it: it is for simulations on one machine",
                remedy="use 'isthmus run', or name each silo's own rows in silo.train and leave [partition] out",
            )
        check_moves_apart(recipe)
        if silo is not None:
            check_examples(recipe, (silo,))
        run.record(recorded_cut(run, recipe))
    return run


def serve(
    path: Path,
    run_dir: Path,
    roles: tuple[str, ...],
    address: str | None,
    how: Serving = BY_RECIPE,
) -> None:
    """Serve roles of the recipe at this path, or of the finished run in the run directory at this path.

    Args:
        run_dir: the roles' run directory, for a recipe.
        address: ``host:port``; None: the recipe's.

    Raises:
        RecipeError: two run directories are named; or Flower is to carry rounds of no root, or of a finished run; or a
            replica is to be of no run, or of more than a trunk.
    """
    if how.replica and (roles != ("trunk",) or not path.is_dir() or how.authority is not None):
        raise RecipeError(
            "a replica serves the trunk of a finished run, and that alone",
            remedy="start 'isthmus trunk DIR --replica' with the run's directory, or a copy of it; "
            "without rounds (train.rounds = 0) 'isthmus trunk RECIPE' on each machine is as good",
        )
    if how.flower is not None and ("root" not in roles or path.is_dir()):
        raise RecipeError(
            "Flower carries the rounds of a root, and here is none that leads any",
            remedy="start 'isthmus trunk RECIPE --with-root --flower SOCKET' or 'isthmus root RECIPE --flower SOCKET'",
        )
    if path.is_dir():
        if run_dir not in (Path(f"runs/{roles[0]}"), path):  # another than the command's default
            raise RecipeError(f"both {path} and {run_dir} are named", remedy="leave out --run-dir")
        serve_run(path, roles, address, how)
    else:
        recipe = Recipe.read(path)
        run = recorded(path, recipe, run_dir)
        if "root" in roles:
            run.role("root").go_on()
        serve_roles(at_address(recipe, address, roles), run, roles, how)


@contextmanager
def alone(run: RunDirectory, roles: tuple[str, ...], *, replica: bool = False) -> Iterator[None]:
    """Lock these roles of a run directory against other processes of them, and the directory against a local engine.

    A process that an engine started does without: the engine has the directory's lock.

    Args:
        roles: ``trunk``, ``root``, or names of edges and silos.
        replica: whether others may serve the same roles if they are replicas, too.

    Raises:
        RunError: another process still has the directory or one of the roles after ``LOCK_SECONDS``.
    """
    with ExitStack() as locks:
        if not by_engine():
            private_folder(run.path)
            locks.enter_context(run.locked(shared=True))
            for role in roles:
                locks.enter_context(run.locked(role=role, shared=replica))
        yield


def serve_roles(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...], how: Serving = BY_RECIPE) -> None:
    """Serve ``trunk``, ``root`` or both until ``Stopped``.

    Args:
        roles: the first one's address and certificate are used for both.

    Raises:
        RankLostError: one of the ranks is gone.
        RecipeError: two roles, but the recipe has them at two addresses.
        RunError: another process serves one of the roles from this directory.
    """
    if len({getattr(recipe, role).address for role in roles}) > 1:
        raise RecipeError(
            f"the trunk is at {recipe.trunk.address}, the root at {recipe.root.address}: one process has one address",
            remedy="give both the same address in the recipe, or start the root by 'isthmus root'",
        )
    set_threads(recipe)
    own: Role = "trunk" if roles[0] == "trunk" else "root"
    kept = kept_certificate(Path(recipe.wire.certificates), roles[0], own, how.authority)
    with suppress(Stopped), alone(run, roles, replica=how.replica), kept:
        recipe = _serve(finished(run, recipe, roles), run, roles, how)
        while True:
            run.record(recipe)
            recipe = _serve(recipe, run, roles, replace(how, number=None), announce=False)


def _serve(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...], how: Serving, *, announce: bool = True) -> Recipe:
    """Serve these roles until silos are added to the recipe, or its cut is to move; returns it with these silos, or
    with the new cut once that is made."""
    authority, ranks, flower = how.authority, how.ranks, how.flower
    server, services = start_server(recipe, run, roles, how.number, authority, replica=how.replica, ranks=ranks)
    if how.monitor is not None:
        how.monitor.watch(server, services)
    address = _at(getattr(recipe, roles[0]).address, server)
    root = services.get("Root")
    growth = Growth(recipe, authority, address) if authority is not None and len(roles) > 1 else None
    moves = RootMoves(recipe, run) if roles == ("root",) and recipe.model.moves else services.get("Moves")
    assert moves is None or isinstance(moves, TrunkMoves | RootMoves)

    def over() -> bool:
        if ranks is not None:
            ranks.check()
        grown = growth is not None and isinstance(root, GreetedAggregator) and growth.due(root)
        return grown or (moves is not None and moves.due())

    own = _identity(recipe, roles)
    try:
        with nullcontext() if flower is None or root is None else carried(flower, recipe, root, own):
            _listen(server, address if announce else None, lambda: _result(recipe, run, roles, root), over)
    finally:
        for service in services.values():
            if isinstance(service, TrunkService):
                service.stop()
    if moves is not None and moves.due():
        return at_address(moves.make(), address, roles)
    assert growth is not None
    return growth.recipe


def serve_run(path: Path, roles: tuple[str, ...], address: str | None, how: Serving = BY_RECIPE) -> None:
    """Serve the trunk, the root or both of a run that has finished, so that its silos can use the result.

    Args:
        path: the run directory.
        address: ``host:port``; None: the recipe's.

    Raises:
        RunError: the folder is no run directory, lacks these roles or the round, or the run is still going on.
    """
    run = RunDirectory.open(path)
    for role in roles:
        if not run.role(role).path.is_dir():
            raise RunError(
                f"{run.path} holds no {role}",
                remedy=f"name the run directory of 'isthmus run' or 'isthmus {role}', or give the recipe",
            )
    with run.locked(shared=True):
        serve_roles(at_address(run.recipe(), address, roles), run, roles, how)


def serve_edge(recipe: Recipe, run: RunDirectory, name: str, monitor: Monitor | None = None) -> None:
    """Serve the edge ``name`` until ``Stopped``.

    Args:
        monitor: tells of the edge.

    Raises:
        RunError: another process serves it from this directory.
    """
    set_threads(recipe)
    kept = kept_certificate(Path(recipe.wire.certificates), name, "edge")
    with suppress(Stopped), alone(run, (name,)), kept:
        server, edge, channel = start_edge(recipe, run, name)
        if monitor is not None:
            monitor.watch(server, {"Root": edge})
        try:
            _listen(server, _at(recipe.tree.node(name).address, server), lambda: _over(recipe, edge))
        finally:
            channel.close()


def _over(recipe: Recipe, edge: Aggregator) -> str | None:
    """A message once no round is left for an edge."""
    return f"{_finished(recipe, edge.vitals().completed)}; nothing is left to do here" if edge.finished else None


def start_edge(recipe: Recipe, run: RunDirectory, name: str) -> tuple[Server, Aggregator, GrpcChannel]:
    """Connect to the parent of the edge ``name`` and start a server of it, at the recipe's address.

    Returns:
        The server, what it serves, and the channel to the parent.
    """
    node, parent, wire = recipe.tree.node(name), recipe.tree.parent(name), recipe.wire
    identity = Identity.load(Path(wire.certificates), name, "edge")
    channel = GrpcChannel(
        recipe.tree.node(parent).address,
        "Root",
        identity,
        server=parent,
        greeting=hello_of(recipe),
        deadline=recipe.waits.reach,
        answer_deadline=recipe.waits.answer,
        endless=not by_engine(),
        limit=wire.max_frame_bytes,
    )
    edge = edge_service(recipe, name, run.edge(name), channel, identity)
    service = GreetedAggregator(recipe, name, edge)
    peers = {"Root": (*node.children, *node.wards)}
    size, grace, edges = wire.max_frame_bytes, _grace(recipe), recipe.tree.edges
    server = Server({"Root": service}, identity, peers, node.address, size, grace, edges=edges)
    server.start()
    return server, edge, channel


def _listen(
    server: Server,
    address: str | None,
    result: Callable[[], str | None],
    over: Callable[[], bool] = lambda: False,
) -> None:
    """Print the server's address and wait for ``Stopped``; then stop the server. Meanwhile freed memory is returned.

    Args:
        address: ``host:port``; None: it is not printed.
        result: a message once the federation has finished; until then None.
        over: whether to stop the server and return.
    """
    try:
        if address is not None:
            print(f"{LISTENING}{address}", flush=True)
            _note_start(address=address)
        waiting, finished = threading.Event(), False
        while not over():
            if not finished and (message := result()) is not None:
                finished = True
                print(message, flush=True)
                log.info("%s", message.partition("\n")[0])
            waiting.wait(LOOK_SECONDS)
            return_memory()
    finally:
        server.stop()


def _grace(recipe: Recipe) -> float:
    """Seconds for which a server keeps its answers for a party without a connection."""
    return 2 * recipe.waits.reach if by_engine() else max(AWAY_SECONDS, 2 * recipe.waits.reach)


def _note_start(**fields: str) -> None:
    told = ", ".join(f"{name} {value}" for name, value in fields.items())
    log.info("started: isthmus %s, %s", isthmus.__version__, told, extra={"version": isthmus.__version__, **fields})


def _at(address: str, server: Server) -> str:
    """The address with the port that the server has."""
    return f"{address.rpartition(':')[0]}:{server.port}"


def _result(recipe: Recipe, run: RunDirectory, roles: tuple[str, ...], root: Service | None = None) -> str | None:
    """What to do with the last round, once all these roles have saved it. Ends the rounds of the root, if it is one of
    them and is asked to."""
    number = min(max(run.role(role).rounds(), default=0) for role in roles)  # called often: reads no file
    if number < recipe.train.rounds:
        if not isinstance(root, GreetedAggregator) or not run.role("root").ended_early:
            return None
        root.end_early()
        return (
            f"{_finished(recipe, number)}; silos hear of it when they have trained the round that they are in\n"
            f"next: isthmus {roles[0]} {run.path}{' --with-root' if len(roles) > 1 else ''} serves what was trained; "
            "start this role with its recipe again to go on"
        )
    if not recipe.train.rounds:
        return f"{_finished(recipe, 0)}; silos can use the model while the trunk runs"
    folders = "" if run.served_here else " (it takes the folders of trunk and root, copied into one)"
    return (
        f"{_finished(recipe, number)}; silos can use the model while the trunk runs\n"
        f"next: isthmus export {run.path} OUT{folders}; later: isthmus {roles[0]} {run.path}"
        f"{' --with-root' if len(roles) > 1 else ''}"
    )


def start_server(
    recipe: Recipe,
    run: RunDirectory,
    roles: tuple[str, ...],
    number: int | None = None,
    authority: AuthorityFolder | None = None,
    *,
    replica: bool = False,
    ranks: Ranks | None = None,
) -> tuple[Server, dict[str, Service]]:
    """Start a server with these roles' services, at the first role's address and with its certificate.

    Args:
        number: the round whose adapter the trunk serves; None: the last one that is saved.
        authority: answers guests here; None: nobody does.
        replica, ranks: as of ``Serving``.

    Returns:
        The server, and its services by gRPC service name (``Trunk``, ``Model``, ``Root``, and where the cut moves
        ``Moves``).

    Raises:
        RunError: the trunk has not saved that round.
    """
    identity = _identity(recipe, roles)
    added = frozenset[str]() if authority is None else authority.added()
    services: dict[str, Service] = {}
    own_trunk: TrunkService | None = None
    peers: dict[str, Collection[str]] = {}
    if "trunk" in roles:
        directory = run.role("trunk")
        if number is not None and number not in directory.rounds():
            saved = ", ".join(map(str, sorted(directory.rounds()))) or "none"
            raise RunError(f"the trunk has not saved round {number}", remedy=f"name one of these: {saved}")
        if number is None and run.role("root").path.exists():
            number = run.completed()  # one run directory: the trunk's adapter must be of the root's round
        trunk = TrunkService(recipe, directory, identity=identity, added=added, replica=replica, ranks=ranks)
        services["Trunk"] = own_trunk = trunk
        services["Model"] = ModelFiles(authority.recipe if authority else lambda: recipe, directory.path / "portions")
        peers["Trunk"] = peers["Model"] = silos = [silo.name for silo in recipe.silo]
        if recipe.model.moves and not by_engine() and not replica:
            services["Moves"] = TrunkMoves(recipe, run, with_root="root" in roles)
            peers["Moves"] = [*silos, ROOT]
        if number is not None:
            trunk.restore(number)
            if recipe.trains_between and number and number == run.completed():  # the root may have ended before it
                trunk.settle(number, run.role("root").load_round(number)["shared"]).result()
    if "root" in roles:
        directory = run.role("root")
        if "trunk" in roles and recipe.federation.asynchronous.buffer is None:
            directory.until = run.completed()  # the root must go on from a round that the trunk has, too
        services["Root"] = GreetedAggregator(recipe, ROOT, root_service(recipe, directory, identity, own_trunk), added)
        peers["Root"] = recipe.tree.node(ROOT).children
    address = getattr(recipe, roles[0]).address
    wire = recipe.wire
    size, grace, edges = wire.max_frame_bytes, _grace(recipe), recipe.tree.edges
    doorkeeper = None if authority is None else AuthorityService(authority)
    server = Server(services, identity, peers, address, size, grace, edges=edges, doorkeeper=doorkeeper)
    server.start()
    return server, services


def _identity(recipe: Recipe, roles: tuple[str, ...]) -> Identity:
    """Of the process that serves these roles: the first one's."""
    return Identity.load(Path(recipe.wire.certificates), roles[0], "trunk" if roles[0] == "trunk" else "root")


def run_silo(recipe: Recipe, run: RunDirectory, name: str, flower: Path | None = None) -> None:
    """Run the silo ``name`` until the federation has finished.

    Args:
        flower: the socket at which it waits for a Flower app, which carries its frames to the root; None: it connects
            to the root itself.

    Raises:
        RunError: another process runs it in this directory.
    """
    set_threads(recipe)
    kept = kept_certificate(Path(recipe.wire.certificates), name, "silo")
    _note_start(trunk=recipe.trunk.address)
    with alone(run, (name,)), kept, _to_root(recipe, name, flower) as root:
        recipe, completed = _train(finished(run, recipe, (name,)), run, name, root)
    move = recipe.next_move(completed)
    if move is not None and move[0] == completed:
        print(f"the cut moves after round {completed}", flush=True)
        return
    trunk = "" if run.served_here else ", while the trunk runs"
    print(
        f"{_finished(recipe, completed)}\n"
        f'next: isthmus generate {run.path} PROMPT --silo {name}, or isthmus.open("{run.path}", "{name}") in Python'
        f"{trunk}; isthmus privacy {run.path}",
        flush=True,
    )


def _train(recipe: Recipe, run: RunDirectory, name: str, root: Channel | None = None) -> tuple[Recipe, int]:
    """Train as this silo until the federation has finished, or in a run directory of all parties until its cut is to
    move. Returns the recipe with the cut that it has then, and the number of finished rounds.

    Args:
        root: the channel to a root through Flower, which carries no move; None: the silo connects itself.
    """
    moves = SiloMoves(run, name)
    while True:
        try:
            with closing(Worker(recipe, name, run.role(name), root=root, endless=not by_engine())) as worker:
                completed = worker.run()
                move = recipe.next_move(completed)
                if move is None or move[0] != completed or by_engine() or not run.deployed:
                    return recipe, completed
                brought = moves.released(recipe, worker, completed)
            recipe = moves.make(recipe, completed, brought)
        except CutMovedError as behind:
            recipe = moves.follow(recipe, behind)


@contextmanager
def _to_root(recipe: Recipe, name: str, flower: Path | None) -> Iterator[Channel | None]:
    """The silo's channel to the root through Flower; None: it is to connect itself."""
    if flower is None:
        yield None
        return
    check_carried(recipe)
    identity = Identity.load(Path(recipe.wire.certificates), name, "silo")
    channel = FlowerChannel(identity, hello_of(recipe.of_silo(name)), limit=recipe.wire.max_frame_bytes)
    with at_socket(channel, flower):
        yield channel


def _finished(recipe: Recipe, completed: int) -> str:
    rounds = recipe.train.rounds
    if not rounds:
        return "nothing trains (train.rounds = 0)"
    if completed < rounds:
        return f"ended early, after {completed} of {rounds} rounds"
    return f"finished after {rounds} round{'' if rounds == 1 else 's'}"


def serve_authority(folder: Path, address: str | None, monitor: Monitor | None = None) -> None:
    """Answer guests and parties from an authority's folder until ``Stopped``, with a server of its own.

    Args:
        address: ``host:port`` to listen at; None: that of the invites.
        monitor: tells of the authority.

    Raises:
        RunError: it is the folder of no authority.
        RecipeError: guests are answered by the trunk or the root.
    """
    authority = AuthorityFolder(folder)
    if authority.server != OWN_SERVER:
        raise RecipeError(
            f"guests of {folder} are answered by the {authority.server}",
            remedy=f"start 'isthmus {authority.server} RECIPE --authority {folder}'",
        )
    certificates, limit = folder / "certificates", 2**20
    with suppress(Stopped), kept_certificate(certificates, OWN_SERVER, "root", authority):
        identity, where = Identity.load(certificates, OWN_SERVER, "root"), address or authority.address
        server = Server({}, identity, {}, where, limit, doorkeeper=AuthorityService(authority))
        server.start()
        if monitor is not None:
            monitor.watch(server, {})
        _listen(server, _at(where, server), lambda: None)
