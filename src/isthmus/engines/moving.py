"""A cut that moves where each party has a machine of its own.

The trunk is where they meet, at its service ``Moves``. After the round the root asks there for the adapters of the
blocks that leave the trunk, and brings those of the blocks that come to it; each silo asks for the moments of the
former, and brings its own of the latter if its updates are open. Once the root and the silos of the round have asked,
or patience has ended, the trunk makes its move and answers from the files that it keeps of it, also who asks later.
Each party makes its move with the answer: a question that died with a process is asked again by the next one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

from isthmus.engines.lifetime import by_engine
from isthmus.engines.repartition import CUT, LEFT, Moments, Move, finish_move, mean_moments, stage_servers, staging
from isthmus.errors import CutMovedError, FrameError, ProtocolError, RecipeError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT, listed
from isthmus.silo.worker import Worker
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoundFiles, RunDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity, Role
from isthmus.wire.senders import check_sender
from isthmus.wire.vitals import Vitals

Shapes = Mapping[str, tuple[int, ...]]
STATES = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}
"""By ``train.optimizer``: what an optimizer's state of a tensor holds."""
OVERHEAD = 64
"""Bytes of a tensor in a frame beside its name and numbers, at most."""
MOST_STEPS = 2**24
"""Optimizer steps that a moment may be of: an fp32 number counts no further."""
LAG_SECONDS = 1.0
"""Time between two looks whether another party has made its move."""
log = logging.getLogger(__name__)


class TrunkMoves:
    """The service ``Moves`` of a trunk, and its own part of each move: with a root in its process, the root's too.

    Args:
        recipe: as it is served.
        run: the directory of the trunk, and of the root if it is here.
        with_root: whether it is.

    Raises:
        RecipeError: what a move sends is more than a frame may hold.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, *, with_root: bool) -> None:
        self._recipe, self._run, self._with_root = recipe, run, with_root
        self._trunk = run.role("trunk")
        self._left = RoundFiles(self._trunk.path / LEFT)
        completed = max(self._trunk.rounds(), default=0)
        check_sizes(recipe, completed)
        due = recipe.next_move(completed)
        self._move = None if due is None else Move(recipe, *due)
        self._lock = threading.Lock()
        self._brought: dict[str, dict[str, torch.Tensor]] = {}
        """By who has asked for the next move: the tensors that came with the question."""
        self._silos: tuple[int, set[str]] = 0, set()
        """A finished round, and the silos that trained in it."""
        self._since: float | None = None
        """When the root was ready."""

    def handle(self, peer: str, request: Message) -> Answer:
        check_sender("the trunk", "Moves", "root" if peer == ROOT else "silo", request)
        if isinstance(request, pb.Ping):
            return answered(pb.Pong())
        assert isinstance(request, pb.Move)
        made, move = max(self._left.rounds(), default=0), self._move
        if request.after <= made:
            kept = self._left.load_round(made) if request.after == made and made else None
            return answered(pb.Moved(after=made, tensors=_given(peer, kept)))
        if move is None or request.after != move.after:
            raise ProtocolError(
                f"{peer} would move the cut after round {request.after}; this trunk made its last move after round "
                f"{made}",
                remedy="start trunk, root and silos with one recipe, from the folders of one run",
            )
        if peer == ROOT:
            brought = codec.decode_named(request.tensors, move.entering)
        else:
            brought = self._checked_moments(move, request)
        with self._lock:
            self._brought[peer] = brought
        return Answer()  # whoever waits is answered by the service that follows, once the move is made

    def _checked_moments(self, move: Move, request: pb.Move) -> dict[str, torch.Tensor]:
        if request.tensors and not self._recipe.opens_updates:
            raise ProtocolError(
                "moments of a silo whose updates are protected: they would tell what that protects",
                remedy="both sides must run the same version of isthmus",
            )
        return flat_moments(decode_moments(request.tensors, move.entering, self._recipe.train.optimizer))

    def due(self) -> bool:
        """Whether the next move can be made: the root has finished the round, and the silos that trained in it have
        asked, or patience has ended."""
        missing = self._missing()
        if missing is None:
            return False
        if self._since is None:
            self._since = time.monotonic()
            log.info("the cut is to move after round %d; expected: %s", self._silos[0], listed(missing))
        return not missing or time.monotonic() - self._since > self._recipe.waits.round

    def vitals(self) -> Vitals:
        """Implements ``wire.vitals.Watched``."""
        missing = self._missing()
        state = "idle" if missing is None else "gathering"
        return Vitals(state, max(self._left.rounds(), default=0), missing=tuple(sorted(missing or ())))

    def _missing(self) -> set[str] | None:
        """The silos that the next move waits for; None: the round, or the root, is not so far."""
        move = self._move
        if move is None or move.after not in self._trunk.rounds():
            return None
        with self._lock:
            here = set(self._brought)
        ready = move.after in self._run.role("root").rounds() if self._with_root else ROOT in here
        return self._trained(move.after) - here if ready else None

    def _trained(self, round: int) -> set[str]:
        """The silos that trained in a round that is finished."""
        if self._silos[0] != round:
            lines = read_journal(self._trunk.path / "metrics.jsonl")
            self._silos = round, {silo for line in lines if line["round"] == round for silo in line["silos"]}
        return self._silos[1]

    def make(self) -> Recipe:
        """Make the move that is ``due``, once nobody is served any more. Returns the recipe with the new cut."""
        move = self._move
        assert move is not None
        names = [silo.name for silo in self._recipe.silo if silo.name in self._brought]
        moments = mean_moments([moments_by_name(self._brought[name]) for name in names])
        roles = ("trunk", "root") if self._with_root else ("trunk",)
        before = self._trunk.load_round(move.after)
        with staging(self._run, move, roles, staging_of("trunk")) as staged:
            if self._with_root:
                stage_servers(staged, self._run, move, {move.after: [moments]})
            else:
                self._stage_alone(staged, move, moments)
            theirs = move.trunk_moments(before)
            left = {
                "adapter": {name: before["adapter"][name] for name in move.leaving},
                "moments": flat_moments({name: theirs[name] for name in move.leaving if name in theirs}),
            }
            RoundFiles(staged.role("trunk").path / LEFT).save_round(move.after, left)
        return move.moved

    def _stage_alone(self, staged: RunDirectory, move: Move, moments: Moments) -> None:
        """Write the moved state of the round, and of the start; what the root had in others this trunk does not
        know."""
        begun = adapters.initial_tensors(Checkpoint(self._recipe.model.path).config, self._recipe)
        for number, tensors, theirs in ((0, begun, {}), (move.after, self._brought[ROOT], moments)):
            if number in self._trunk.rounds():
                state = move.of_trunk(self._trunk.load_round(number), tensors, theirs)
                staged.role("trunk").save_round(number, state)


class RootMoves:
    """A root's part of each move, where its trunk is another process.

    Args:
        recipe: as it is served.
        run: the root's directory.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self._recipe, self._run, self._root = recipe, run, run.role("root")
        due = recipe.next_move(max(self._root.rounds(), default=0))
        self._move = None if due is None else Move(recipe, *due)
        self._asked: Future[pb.Moved] | None = None

    def due(self) -> bool:
        """Whether the trunk has made the next move. It is asked once the round has finished.

        Raises:
            IsthmusError: the trunk refuses, or cannot be reached.
        """
        move = self._move
        if move is None or move.after not in self._root.rounds():
            return False
        if self._asked is None:
            shared = self._root.load_round(move.after)["shared"]
            entering = codec.encode_named({name: shared[name] for name in move.entering})
            asked: Future[pb.Moved] = Future()
            self._asked = asked
            request = pb.Move(after=move.after, tensors=entering)
            log.info("the cut is to move after round %d; asking the trunk", move.after)
            threading.Thread(target=_settle, args=(asked, self._recipe, request), daemon=True).start()
        if not self._asked.done():
            return False
        self._asked.result()
        return True

    def make(self) -> Recipe:
        """Make the move that is ``due``. Returns the recipe with the new cut.

        Raises:
            ProtocolError: the trunk has made another one.
        """
        move, asked = self._move, self._asked
        assert move is not None
        assert asked is not None
        moved = asked.result()
        if moved.after != move.after:
            raise ProtocolError(
                f"the trunk has moved its cut after round {moved.after}, this root is at round {move.after}",
                remedy="start trunk and root from the folders of one run",
            )
        tensors = codec.decode_named(moved.tensors, move.leaving)
        with staging(self._run, move, ("root",), staging_of("root")) as staged:
            state = self._root.load_round(move.after)
            staged.role("root").save_round(move.after, move.of_root(state, tensors))
        return move.moved


def _settle(asked: Future[pb.Moved], recipe: Recipe, request: pb.Move) -> None:
    try:
        asked.set_result(_ask(recipe, ROOT, "root", request))
    except BaseException as error:
        asked.set_exception(error)


class SiloMoves:
    """A silo's part of each move.

    Args:
        run: the silo's directory.
        name: the silo's.
    """

    def __init__(self, run: RunDirectory, name: str) -> None:
        self._run, self._name, self._silo = run, name, run.role(name)

    def released(self, recipe: Recipe, worker: Worker, completed: int) -> Mapping[str, torch.Tensor]:
        """The moments of blocks that go to the trunk after this round, as they leave the silo; none where its updates
        are protected."""
        if not recipe.opens_updates or completed not in self._silo.rounds():
            return {}
        move = Move(recipe, completed, recipe.cut_after(completed))
        own = move.moments(self._silo.load_round(completed))
        return worker.release_moments(completed, flat_moments({key: own[key] for key in move.entering if key in own}))

    def make(self, recipe: Recipe, completed: int, brought: Mapping[str, torch.Tensor]) -> Recipe:
        """Make the move that is due after this round. Returns the recipe with the new cut.

        Args:
            brought: ``released``.

        Raises:
            IsthmusError: the trunk refuses.
        """
        log.info("the cut is to move after round %d; asking the trunk", completed)
        return self._made(recipe, pb.Move(after=completed, tensors=codec.encode_named(brought)))

    def follow(self, recipe: Recipe, behind: CutMovedError) -> Recipe:
        """Make the trunk's last move, if this silo has not; else wait a little, since another party has not. Returns
        the recipe with the cut that the silo has then.

        Args:
            behind: how a server refused this silo.

        Raises:
            CutMovedError: the trunk has made no move yet: the recipes differ.
            IsthmusError: the trunk refuses, or has moved as this silo's recipe does not say.
        """
        log.info("%s", behind.message)
        made = self._ask(recipe, pb.Move()).after
        if not made:
            raise behind
        if recipe.cut_after(made) == (recipe.model.bottom, recipe.model.top):
            time.sleep(LAG_SECONDS)
            return recipe
        return self._made(recipe, pb.Move(after=made))

    def _made(self, recipe: Recipe, request: pb.Move) -> Recipe:
        moved = self._ask(recipe, request)
        move = Move(recipe, moved.after, recipe.cut_after(moved.after))
        moments: Moments = {}
        if moved.after == request.after:
            moments = decode_moments(moved.tensors, move.leaving, recipe.train.optimizer)
        with staging(self._run, move, (self._name,), staging_of(self._name)) as staged:
            if move.after in self._silo.rounds():
                state = self._silo.load_round(move.after)
                staged.role(self._name).save_round(move.after, move.of_silo(state, moments))
        return move.moved

    def _ask(self, recipe: Recipe, request: pb.Move) -> pb.Moved:
        return _ask(recipe, self._name, "silo", request)


def _ask(recipe: Recipe, name: str, role: Role, request: pb.Move) -> pb.Moved:
    """The trunk's answer, however long it takes."""
    channel = GrpcChannel(
        recipe.trunk.address,
        "Moves",
        Identity.load(Path(recipe.wire.certificates), name, role),
        server="trunk",
        deadline=recipe.waits.reach,
        answer_deadline=recipe.waits.answer,
        endless=not by_engine(),
        limit=recipe.wire.max_frame_bytes,
    )
    with closing(channel):
        return channel.call(request)  # type: ignore[no-any-return]


def staging_of(role: str) -> str:
    """Name of the folder for a role's new files."""
    return f"moving-{role}"


def recorded_cut(run: RunDirectory, recipe: Recipe) -> Recipe:
    """The recipe with the cut of that which a run directory has, if the recipe moves the cut to it."""
    if not recipe.model.moves or not run.recipe_path.exists():
        return recipe
    model = run.recipe().model
    reached = {recipe.cut_after(move["after"]) for move in recipe.model.moves}
    ends = model.bottom, model.top
    return recipe.moved_to(ends) if model.moves == recipe.model.moves and ends in reached else recipe


def finished(run: RunDirectory, recipe: Recipe, roles: Sequence[str]) -> Recipe:
    """The recipe with the cut that a party's files have come to, after a move that was cut off is finished there.

    Args:
        roles: those that this process serves from the directory.
    """
    if not recipe.model.moves or by_engine():  # which moves the cut itself
        return recipe
    finish_move(run, roles, staging_of(roles[0]))
    file = run.role(roles[0]).path / CUT
    if not file.exists():
        return recipe
    bottom, top = file.read_text(encoding="ascii").split()
    return recipe.moved_to((int(bottom), int(top)))


def check_moves_apart(recipe: Recipe) -> None:
    """Check that the recipe's moves can be made by parties on machines of their own.

    Raises:
        RecipeError: there are edges, which have one cut for good.
    """
    if recipe.model.moves and recipe.edge:
        raise RecipeError(
            "model.moves: an edge on a machine of its own does not follow a cut that moves",
            remedy="use 'isthmus run', leave out [[edge]], or leave out model.moves",
        )


def check_sizes(recipe: Recipe, completed: int) -> None:
    """Check that what each move after so many rounds sends fits into a frame, before it is due.

    Raises:
        RecipeError: it does not.
    """
    states, most = STATES[recipe.train.optimizer], 0
    while (due := recipe.next_move(completed)) is not None:
        move = Move(recipe, *due)
        for shapes in (move.leaving, move.entering):
            moments = _state_shapes(shapes, states)
            most = max(most, *(sum(map(_bytes, sent.items())) for sent in (shapes, moments)))
        recipe, completed = move.moved, move.after
    if most > recipe.wire.max_frame_bytes:
        raise RecipeError(
            f"model.moves: the adapters and moments of blocks that change sides are up to {most:,} bytes, "
            f"wire.max_frame_bytes is {recipe.wire.max_frame_bytes:,}",
            remedy=f"raise wire.max_frame_bytes to {most:,} for all parties, or move fewer blocks at once",
        )


def _bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor in a frame, at most."""
    name, shape = tensor
    return 4 * math.prod(shape) + len(name) + OVERHEAD


def flat_moments(moments: Moments) -> dict[str, torch.Tensor]:
    """Moments as tensors, each by its tensor's name and its own, with a space between."""
    return {
        f"{name} {key}": value
        for name, state in moments.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def moments_by_name(flat: Mapping[str, torch.Tensor]) -> Moments:
    """Moments of such tensors (see ``flat_moments``)."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        name, _, kind = key.rpartition(" ")
        found.setdefault(name, {})[kind] = value
    return found


def decode_moments(tensors: Iterable[pb.Tensor], shapes: Shapes, optimizer: str) -> Moments:
    """Received moments of these tensors, or of some of them.

    Args:
        shapes: of the tensors, by uncut name.
        optimizer: ``train.optimizer``.

    Raises:
        FrameError: they are of other tensors, shapes or an optimizer of another kind, or no optimizer could have made
            them: a number of steps out of range, squares below zero, what is not finite.
    """
    received, states = list(tensors), STATES[optimizer]
    told = {one.name.rpartition(" ")[0] for one in received}
    known = {name: shape for name, shape in shapes.items() if name in told}
    found = moments_by_name(codec.decode_named(received, _state_shapes(known, states)))
    for name, state in found.items():
        steps, squares = state.get("step"), state.get("exp_avg_sq")
        if (steps is not None and not 0 <= float(steps) <= MOST_STEPS) or (squares is not None and squares.min() < 0):
            raise FrameError(
                f"received moments of {name} that no optimizer makes",
                remedy="both sides must run the same version of isthmus",
            )
    return found


def _state_shapes(shapes: Shapes, states: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {f"{name} {key}": () if key == "step" else shape for name, shape in shapes.items() for key in states}


def _given(peer: str, left: Mapping[str, Any] | None) -> list[pb.Tensor]:
    """What a party gets of what has left the trunk."""
    return [] if left is None else codec.encode_named(left["adapter" if peer == ROOT else "moments"])
