"""Planners of a node's rounds: they give the plan of a round and take what was collected in it. The root's steps the
shared tensors; an edge's asks its parent for plans and sends it one sum a round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch
from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.federation.central import central_noise
from isthmus.federation.clip import Clip
from isthmus.federation.collection import Collected
from isthmus.federation.contribution import Contribution, changes, proportions
from isthmus.federation.control import root_control
from isthmus.federation.products import sharing_of
from isthmus.federation.sharing import Sharing
from isthmus.federation.strategies.rules import Mean
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.storage.journal import read_journal
from isthmus.storage.record import RoleDirectory
from isthmus.updates.between import BlocksChange, TrunkBlocks
from isthmus.updates.compression import Compression
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel, answered

T = TypeVar("T")


class Planner(Protocol):
    """Plans rounds for the state machine of ``rounds``."""

    completed: int
    """Number of rounds that are finished, as far as this node knows."""

    @property
    def over(self) -> bool:
        """Whether no round is left, as far as this node knows."""
        ...

    def meet(self, peer: str, run: str) -> None:
        """A child asks for work, connected to the trunk of the run with this name; empty: it does not say.

        Raises:
            ProtocolError: the rounds so far were trained with another trunk.
        """
        ...

    def current(self, peer: str = "") -> Answer:
        """``pb.Adapters``: the shared tensors of this child's blocks after the last finished round."""
        ...

    def plan(self, silos: Iterable[str]) -> Answer:
        """A ``pb.Plan`` for these silos: the next round, or round 0 where none is left."""
        ...

    def own(self, plan: pb.Plan, peer: str) -> pb.Plan:
        """The plan as this child gets it."""
        ...

    def layout(self, peer: str, round: int) -> Layout:
        """The layout of this child's update in this round; under masks all children have one."""
        ...

    def conclude(self, round: int, collected: Collected) -> Answer:
        """Take what was collected in this round. The answer's result is ignored. After ``RoundLostError`` the round
        begins again, after another error the rounds end."""
        ...


class RootPlanner:
    """The root's planner: the shared tensors from round to round, on disk before any child gets them.

    Args:
        initial: the shared adapter tensors, by uncut name, as every silo starts with them.
        store: where the tensors after each round are kept; the last ones there are continued from.
        trunk: its copy of blocks that some silos keep, where the recipe trains them; else None.
    """

    def __init__(
        self,
        recipe: Recipe,
        initial: Mapping[str, torch.Tensor],
        store: RoleDirectory,
        trunk: TrunkBlocks | None = None,
    ) -> None:
        self._trunk = trunk
        self._rounds = recipe.train.rounds
        self._store = store
        store.keep_as(recipe.train)
        self._journal = store.journal("metrics")
        self._sharing = sharing_of(recipe)
        self._control = root_control(recipe)
        clip = recipe.federation.clip
        self._clip = Clip(clip, self._sharing) if clip is not None else None
        self._journals_shares = recipe.federation.weights.kind != "examples"
        self._plans: dict[int, pb.Plan] = {}
        self._named: dict[str, str] = {}
        """By child, the name of a run that it said last."""
        self.run = ""
        """Name of the run whose trunk the silos are connected to, as most of them said before the first round was
        finished; empty: none has said."""
        self.completed = store.last_round()
        move = recipe.next_move(self.completed)
        if move is not None:  # the engine moves the cut once the silos have ended
            self._rounds = min(self._rounds, move[0])
        self.shared: dict[str, torch.Tensor] = dict(initial)
        if self.completed:
            state = store.load_round(self.completed)
            self.shared, self.run = state["shared"], state.get("run", "")
            self._complete_journal(state.get("line"))
            self._sharing.load_state_dict(state.get("sharing", {}))
            if self._control is not None:
                self._control.load_state_dict(state["control"])
            if self._clip is not None:
                self._clip.load_state_dict(state.get("clip", {}))
        self._noise = central_noise(recipe, store)

    @property
    def over(self) -> bool:
        return self.completed >= self._rounds or self._store.ended_early

    def meet(self, peer: str, run: str) -> None:
        if self.completed and self.run and run and run != self.run:
            raise ProtocolError(
                f"{peer} is connected to the trunk of another run than that of the {self.completed} finished rounds",
                remedy="start trunk and root from the same run, or both from new run directories",
            )
        if run:
            self._named[peer] = run
        if not (self.completed and self.run):  # else one silo's word would shut out all others
            self.run = _most_named(self._named)

    def current(self, peer: str = "") -> Answer:
        shared = codec.encode_named(self._sharing.held(self.shared, peer) if peer else self.shared)
        return answered(pb.Adapters(completed=self.completed, adapters=shared, run=self.run))

    def plan(self, silos: Iterable[str]) -> Answer:
        if self._trunk is None:
            return answered(self.next(silos))
        chosen = list(silos)  # the trunk goes on from the root's tensors before any silo gets them
        return _after(self._trunk.settle(self.completed, self.shared), lambda _: self.next(chosen))

    def next(self, silos: Iterable[str]) -> pb.Plan:
        """The next plan for these silos."""
        plan = pb.Plan(completed=self.completed)
        if not self.over:
            plan.round = self.completed + 1
            if self._clip is not None:
                plan.clip = self._clip.norm(plan.round)
            plan.participants.extend(sorted(silos))
            if self._control is not None:
                self._control.add_to(plan, self.layout("", plan.round))
        self._plans = {}
        return plan

    def own(self, plan: pb.Plan, peer: str) -> pb.Plan:
        """The plan with the adapters that this child begins with."""
        begun = self._sharing.begun(self.shared, peer)
        if id(begun) not in self._plans:  # most children begin with the very same tensors
            self._plans[id(begun)] = own = pb.Plan(adapters=codec.encode_named(begun))
            own.MergeFrom(plan)
        return self._plans[id(begun)]

    def layout(self, peer: str, round: int) -> Layout:
        return self._sharing.layout(self._sharing.begun(self.shared, peer), round)

    def conclude(self, round: int, collected: Collected) -> Answer:
        if self._trunk is None:
            return answered(self._conclude(round, collected, []))
        return _after(self._trunk.trained(round), lambda moved: self._conclude(round, collected, moved))

    def _conclude(self, round: int, collected: Collected, moved: Sequence[BlocksChange]) -> pb.Accepted:
        line: dict[str, Any] = {"round": round, "weights": collected.weights}
        kept: dict[str, Any] = {}
        if self._clip is not None:
            line["clip"] = clip = self._clip.norm(round)
            if self._noise is not None:
                collected = self._noise.added(round, collected, clip)
            self._clip.follow(round, collected)
            kept["clip"] = self._clip.state_dict()
        trunk = [Contribution("trunk", one.weight, one.change) for one in moved if one.weight]
        if trunk:
            line["trunk"] = [one.weight for one in trunk]
        shared = self._sharing.next(self.shared, round, [*collected.contributions, *trunk])
        kept |= {"shared": shared, "run": self.run, "sharing": self._sharing.state_dict()}
        if self._control is not None:
            self._control.follow(round, collected, self.layout("", round))
            kept["control"] = self._control.state_dict()
        if collected.staleness is not None:
            line["staleness"] = collected.staleness
        if self._journals_shares:
            line["shares"] = self._sharing.shares
        self._store.save_round(round, kept | {"line": line})
        self._journal.append(line)
        self.shared, self.completed = shared, round
        return pb.Accepted()

    def _complete_journal(self, line: dict[str, Any] | None) -> None:
        """Write the last round's line, if the process that saved the round ended before it wrote the line."""
        written = read_journal(self._store.path / "metrics.jsonl")
        if line is not None and all(one["round"] != self.completed for one in written):
            self._journal.append(line)


class EdgePlanner:
    """An edge's planner: plans come from its parent, and one sum goes there.

    Args:
        initial: as of ``RootPlanner``; their shapes count.
        parent: the way to the parent.
    """

    over = False

    def __init__(
        self, recipe: Recipe, initial: Mapping[str, torch.Tensor], store: RoleDirectory, parent: Channel
    ) -> None:
        self._initial, self._parent = initial, parent
        self._sharing = Sharing(recipe.federation)
        self._masks, self._compression = recipe.federation.secure.masks, Compression.of(recipe)
        self._journal = store.journal("metrics")
        self._present = 0
        """Number of silos in the last ``Ready``: the format of their sum follows from it."""
        self.completed = 0
        self._named: dict[str, str] = {}

    def meet(self, peer: str, run: str) -> None:
        if run:
            self._named[peer] = run  # the root compares the names

    def current(self, peer: str = "") -> Answer:
        return self._parent.submit(pb.Current())

    def plan(self, silos: Iterable[str]) -> Answer:
        present = sorted(silos)
        self._present = len(present)
        return self._parent.submit(pb.Ready(completed=self.completed, silos=present, run=_most_named(self._named)))

    def own(self, plan: pb.Plan, peer: str) -> pb.Plan:
        return plan

    def layout(self, peer: str, round: int) -> Layout:
        return self._sharing.layout(self._initial, round)

    def conclude(self, round: int, collected: Collected) -> Answer:
        answer = self._parent.submit(self._update(round, collected))
        answer.add_done_callback(lambda done: self._note(round, collected, done))
        return answer

    def _update(self, round: int, collected: Collected) -> pb.Update:
        update, learned, layout = pb.Update(round=round), collected.contributions, self.layout("", round)
        if not learned:
            return update
        if not self._masks:
            mean_P = Mean().combine(changes(learned, layout), proportions(learned), faults=0)
            update.weight = sum(one.weight for one in learned)
            update.tensors.extend(codec.encode_named(layout.tensors(mean_P)))
        else:
            assert collected.total_KS is not None
            update.silos = int(sum(collected.weights.values()))
            ring = self._compression.sum_format(layout, round, self._present).ring
            update.masked = ring.written(ring.pack(collected.total_KS))
        return update

    def _note(self, round: int, collected: Collected, done: Answer) -> None:
        if done.exception() is None:
            self.completed = round
            self._journal.append({"round": round, "weights": collected.weights})


def _after(done: Future[T], compute: Callable[[T], Message]) -> Answer:
    """The answer that this function makes of a result, once it is there."""
    answer = Answer()

    def settle(done: Future[T]) -> None:
        try:
            answer.set_result(compute(done.result()))
        except Exception as error:
            answer.set_exception(error)

    done.add_done_callback(settle)
    return answer


def _most_named(named: Mapping[str, str]) -> str:
    """The name that most children gave; empty: none gave any."""
    return max(Counter(named.values()).items(), key=lambda pair: pair[1], default=("", 0))[0]


def shared_tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The adapter tensors that the silos of this recipe share, as each of them starts with them; where silos keep
    different blocks, all that any silo keeps and trains."""
    recipe = recipe.of_widest if recipe.trains_between else recipe
    config = Checkpoint(recipe.model.path).config
    shared = adapters.shared_shapes(adapters.empty_ends(config, recipe))
    return {name: tensor for name, tensor in adapters.initial_tensors(config, recipe).items() if name in shared}
