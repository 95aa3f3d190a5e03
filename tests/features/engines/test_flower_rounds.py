"""Rounds in letters: the whole of isthmus' side of Flower, with threads in place of Flower's processes.

What Flower does between the two sockets is played by ``Post``: it delivers, loses and delays messages. That the real
one does as well takes processes (``tests/integration/test_flower_deployment.py``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from isthmus.engines.certificates import make_certificates
from isthmus.engines.flower.courier.delivery import Courier, Delivered, hand_over
from isthmus.engines.flower.courier.letters import Letter, ask
from isthmus.engines.flower.root_end import carried
from isthmus.engines.flower.silo_end import FlowerChannel, at_socket, listening
from isthmus.engines.local import at_address, create_run
from isthmus.engines.roles import run_silo, start_server
from isthmus.errors import IdentityError, RunError
from isthmus.model.agreement import hello_of
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.channel import Service
from isthmus.wire.identity import Identity, save_identity
from tests.conftest import write_rows
from tests.integration.processes import rows_of, run_here, write_federation

ROUNDS, HANG = 3, 60.0
Node = dict[str, object]


class Post:
    """Flower's part: messages to nodes, each in a thread. ``nodes`` may change while it runs."""

    def __init__(self, nodes: Mapping[int, Node], lost: Callable[[int], bool] = lambda number: False) -> None:
        self.nodes, self.carried = dict(nodes), Counter[int]()
        self.failures: list[str] = []
        self._lost = lost
        self._threads = ThreadPoolExecutor(8)
        self._under_way: dict[str, Future[Letter]] = {}

    def online(self) -> dict[int, str]:
        return dict.fromkeys(self.nodes, "the start")

    def send(self, letters: Collection[tuple[int, Letter]], ttl: float) -> list[str | None]:
        names: list[str | None] = []
        for node, letter in letters:
            self.carried[node] += 1
            names.append(str(self.carried.total()))
            self._under_way[str(names[-1])] = self._threads.submit(hand_over, letter, self.nodes[node])
        return names

    def fetch(self, messages: Collection[str]) -> list[Delivered]:
        done = [name for name in messages if self._under_way[name].done()]
        return [self._delivered(name, self._under_way.pop(name)) for name in done]

    def _delivered(self, name: str, done: Future[Letter]) -> Delivered:
        if (error := done.exception()) is not None:
            self.failures.append(str(error))
            return Delivered(name, None, str(error))
        if self._lost(int(name)):
            return Delivered(name, None, "lost")
        return Delivered(name, done.result())


@dataclass
class Federation:
    """Root and silos of a recipe, waiting for letters."""

    run: RunDirectory
    folder: Path
    service: Service
    identity: Identity
    recipe: Recipe
    working: list[Future[None]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "root.sock"

    def nodes(self) -> dict[int, Node]:
        return {100 + number: self.node(silo.name) for number, silo in enumerate(self.recipe.silo)}

    def node(self, silo: str) -> Node:
        return {"silo": silo, "socket": str(self.folder / f"{silo}.sock")}

    def courier(self, post: Post) -> Courier:
        return Courier(post, lambda letter: ask(self.root, letter, patience=5.0), hold=10.0)

    def carry(self, post: Post) -> None:
        """Carry letters until all is over."""
        courier, end = self.courier(post), time.monotonic() + HANG
        while courier.carry(0.05):
            assert time.monotonic() < end, post.failures
        for one in self.working:
            one.result(HANG)

    def shared(self, round: int = ROUNDS) -> dict[str, torch.Tensor]:
        return shared_of(self.run, round)


def shared_of(run: RunDirectory, round: int = ROUNDS) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = run.role("root").load_round(round)["shared"]
    return tensors


@contextmanager
def federation(recipe: Path, path: Path, *, root: bool = True, silos: bool = True) -> Iterator[Federation]:
    run = create_run(Recipe.read(recipe), path / "run")
    certificates = Path(run.recipe().wire.certificates)
    make_certificates(run.recipe(), certificates)
    server, services = start_server(at_address(run.recipe(), "localhost:0"), run, ("trunk", "root"))
    there = at_address(run.recipe(), f"localhost:{server.port}")
    identity = Identity.load(certificates, "trunk", "trunk")
    made = Federation(run, path, services["Root"], identity, there)
    with ExitStack() as stack:
        stack.callback(services["Trunk"].stop)  # type: ignore[attr-defined]
        stack.callback(server.stop)
        if root:
            stack.enter_context(carried(made.root, there, made.service, identity))
        threads = stack.enter_context(ThreadPoolExecutor(len(there.silo)))
        for silo in there.silo if silos else ():
            socket = path / f"{silo.name}.sock"
            made.working.append(threads.submit(run_silo, there, run, silo.name, socket))
        yield made


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    return write_federation(folder, train={"rounds": ROUNDS, "steps": 4, "evaluate": False})


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, torch.Tensor]:
    """The adapters of the same recipe without Flower."""
    run_here(recipe, recipe.parent / "plain")
    return shared_of(RunDirectory.open(recipe.parent / "plain"))


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_round_is_one_message_a_silo_and_gives_the_same_adapters(
    recipe: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with federation(recipe, tmp_path) as made:
        post = Post(made.nodes())
        made.carry(post)
        assert_equal(made.shared(), expected)
    assert post.carried == dict.fromkeys((100, 101), 2 + ROUNDS + 1), "two to connect, one that tells the end"
    assert not post.failures


def test_lost_messages_are_sent_again_and_change_nothing(
    recipe: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with federation(recipe, tmp_path) as made:
        post = Post(made.nodes(), lost=lambda number: number % 3 == 0)
        made.carry(post)
        assert_equal(made.shared(), expected)
    assert post.carried.total() > 2 * (2 + ROUNDS + 1)


def test_a_root_that_starts_again_is_met_by_the_same_silos(
    recipe: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its sockets and connections are new; the service behind it has the federation's state, as it has on disk."""
    with federation(recipe, tmp_path, root=False) as made:
        post = Post(made.nodes())
        with carried(made.root, made.recipe, made.service, made.identity):
            courier = made.courier(post)
            while made.run.completed() < 1:
                courier.carry(0.05)
        with carried(made.root, made.recipe, made.service, made.identity):
            made.carry(post)
        assert_equal(made.shared(), expected)


def test_an_app_that_is_run_again_carries_on(recipe: Path, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With the same root and silos; what the first one had under way is lost."""
    with federation(recipe, tmp_path) as made:
        post = Post(made.nodes())
        courier = made.courier(post)
        while made.run.completed() < 1:
            courier.carry(0.05)
        made.carry(Post(made.nodes()))
        assert_equal(made.shared(), expected)


def test_masked_rounds_take_four_messages_and_sum_the_same_numbers(tmp_path: Path) -> None:
    """Each silo rounds its numbers with a secret draw: two runs without Flower differ as much."""
    silos = ("east", "north", "south", "west")
    for silo in silos:
        write_rows(tmp_path / f"{silo}.jsonl", rows_of(silo))
    recipe = write_federation(
        tmp_path,
        silo=[{"name": silo, "train": f"{silo}.jsonl"} for silo in silos],
        train={"rounds": 2, "steps": 4, "evaluate": False, "optimizer": "sgd", "learning_rate": 0.1},
        federation={"secure": {"masks": True}},
    )
    run_here(recipe, tmp_path / "plain")
    with federation(recipe, tmp_path / "flower") as made:
        post = Post(made.nodes())
        made.carry(post)
        found, expected = made.shared(2), shared_of(RunDirectory.open(tmp_path / "plain"), 2)
        assert all(torch.allclose(found[name], one, rtol=0, atol=1e-4) for name, one in expected.items())
    assert set(post.carried.values()) == {2 + 4 * 2 + 1}


def _refused(made: Federation, nodes: Mapping[int, Node], log: pytest.LogCaptureFixture, told: str) -> None:
    """Carry until a node is refused with this; the others' federation goes on to its end."""
    post = Post(made.nodes() | dict(nodes))
    made.carry(post)
    assert any(told in one for one in post.failures), post.failures
    assert any(told in one for one in log.messages)


def test_a_node_that_names_another_nodes_silo_is_refused(
    recipe: Path, expected: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with federation(recipe, tmp_path) as made:
        post = Post(made.nodes())
        courier = made.courier(post)
        while made.run.completed() < 1:
            courier.carry(0.05)
        post.nodes[7] = made.node("south")
        while courier.carry(0.05):
            pass
        assert_equal(made.shared(), expected)
    assert any("node 7 names the silo south, which node 101 has shown that it is" in one for one in post.failures)


def test_a_node_that_names_a_silo_of_another_recipe_is_refused(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_federation(
        tmp_path / "other",
        silo=[{"name": name, "train": "north.jsonl"} for name in ("north", "stray")],
        train={"rounds": ROUNDS, "evaluate": False},
    )
    strays = create_run(Recipe.read(other), tmp_path / "other" / "run")
    certificates = Path(strays.recipe().wire.certificates)
    make_certificates(strays.recipe(), certificates)
    with federation(recipe, tmp_path) as made, _stray(strays, "stray", made) as node:
        _refused(made, {7: node}, caplog, "node 7 names the silo 'stray', which is not in the recipe")


def test_a_silo_with_a_key_of_another_authority_is_refused_and_says_so(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with federation(recipe, tmp_path, silos=False) as made:
        forged = tmp_path / "forged"
        authority = Authority()
        trusted = Identity.load(Path(made.recipe.wire.certificates), "north", "silo").authority
        issued = authority.issue("north")
        save_identity(Identity("north", trusted + authority.certificate, issued.certificate, issued.key), forged)
        with pytest.raises(IdentityError) as refused:
            _meet(made, Identity.load(forged, "north", "silo"))
        assert "through Flower" in refused.value.message
        assert any("a node is refused" in one for one in caplog.messages)


def _meet(made: Federation, identity: Identity) -> None:
    """What a silo with this identity hears of the root."""
    channel, socket = FlowerChannel(identity, hello_of(made.recipe.of_silo("north"))), made.folder / "forged.sock"
    courier = made.courier(Post({1: {"silo": "north", "socket": str(socket)}}))
    with ThreadPoolExecutor(1) as thread, at_socket(channel, socket):
        asked, end = thread.submit(channel.call, pb.Ready()), time.monotonic() + HANG
        while not asked.done():
            courier.carry(0.05)
            assert time.monotonic() < end
        asked.result()


@contextmanager
def _stray(run: RunDirectory, silo: str, made: Federation) -> Iterator[Node]:
    """A silo of another federation, which waits at its socket."""
    identity = Identity.load(Path(run.recipe().wire.certificates), silo, "silo")
    socket = made.folder / "stray.sock"
    with listening(socket, FlowerChannel(identity, hello_of(run.recipe().of_silo(silo))).exchange):
        yield {"silo": silo, "socket": str(socket)}


def test_a_second_process_at_a_socket_is_refused(recipe: Path, tmp_path: Path) -> None:
    with federation(recipe, tmp_path, silos=False) as made:
        again = carried(made.root, made.recipe, made.service, made.identity)
        with pytest.raises(RunError, match="another process listens"), again:
            pass
