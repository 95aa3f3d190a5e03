"""What adversaries do to a silo that do not follow the protocol: a root that gives adapters, a trunk that returns
gradients.

The silo runs in this process with its own code, and refuses what it refuses in a run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from google.protobuf.message import Message

from isthmus.attacks.view.frames import sequences_of
from isthmus.attacks.view.tap import Tap
from isthmus.attacks.view.view import Crossing, Lesson, Steering
from isthmus.audit.capture import capture_rows, restored_trunk, tapped_silo, training_alone
from isthmus.audit.target import Target, Tensors
from isthmus.data.tokens import Tokens
from isthmus.engines.zero_trunk import ZeroTrunk
from isthmus.federation.aggregator import root_service
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.silo.accepted import max_change
from isthmus.silo.join import greeting
from isthmus.silo.served import SharedAdapters
from isthmus.silo.worker import Worker
from isthmus.storage.record import RoleDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, LoopbackChannel, Service

Teach = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""From what crossed of each sequence of a step to the gradients that are returned for it."""


def steering_of(target: Target, name: str, rows: Sequence[Tokens]) -> Steering:
    """What a root that lies can do to a silo, and to these rows of it: give adapters as those of the recipe's last
    round, or of one more if that has finished. All rounds until then together bound how far they may be."""
    with tapped_silo(target, name, ZeroTrunk(target.recipe)) as (silo, _):
        published = {key: one.detach().clone() for part in silo.parts for key, one in adapters.trainable(part).items()}
    bound = max_change(target.recipe, sum(one.numel() for one in published.values()))
    last = max(target.completed + 1, target.recipe.train.rounds)

    def give(tensors: Tensors) -> tuple[Crossing, ...]:
        return capture_rows(target, name, rows, SharedAdapters(last, "", tensors)).crossings

    return Steering(published, None if bound is None else (last - target.completed) * bound, give)


class HijackedTrunk:
    """A trunk that returns gradients of its own for bottom. Implements ``wire.channel.Service``."""

    def __init__(
        self, trunk: Service, recipe: Recipe, teach: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        self._trunk, self._teach, self._codec = trunk, teach, recipe.boundary.codec.gradient_down
        self._steps: dict[int, list[torch.Tensor]] = {}

    def handle(self, peer: str, request: Message) -> Answer:
        answer = self._trunk.handle(peer, request)
        if isinstance(request, pb.Forward) and request.train and not request.examples:
            self._steps[request.step] = sequences_of(request.hidden, request.lengths)
        if not (isinstance(request, pb.Backward) and request.reply):
            return answer
        sequences, taught = self._steps.pop(request.step), Answer()

        def receive(done: Answer) -> None:
            if (error := done.exception()) is not None:
                taught.set_exception(error)
                return
            found = done.result()
            assert isinstance(found, pb.Gradient)
            found.gradient.CopyFrom(codec.encode(torch.cat(self._teach(sequences)), self._codec))
            taught.set_result(found)

        answer.add_done_callback(receive)
        return taught


def capture_hijacked(
    target: Target, name: str, rows: Sequence[Tokens], lesson: Lesson
) -> tuple[tuple[Crossing, ...], Tensors]:
    """Crossings of these rows after the silo has trained alone beside a hijacked trunk and an honest root: for all
    rounds of the recipe that are left, or one more. And the adapters of bottom and top after them.

    Args:
        name: the silo.
        lesson: the gradients that the trunk returns.
    """
    rounds = max(target.completed + 1, target.recipe.train.rounds)
    recipe = training_alone(target, name, rounds)
    with tempfile.TemporaryDirectory() as temporary, restored_trunk(target, recipe) as service:
        root = RoleDirectory(Path(temporary) / "root")
        if target.completed:
            root.save_round(target.completed, {"shared": dict(target.shared())})
        known = Tap(
            LoopbackChannel(root_service(recipe, root, trunk=service), name)
        )  # a colluding silo gets the same plans

        def teach(sequences: list[torch.Tensor]) -> list[torch.Tensor]:
            plan = [one.response for one in known.exchanges if one.kind is pb.Ready][-1]
            return lesson(
                sequences, codec.decode_named(plan.adapters, {one.name: tuple(one.shape) for one in plan.adapters})
            )

        trunk = HijackedTrunk(service, recipe, teach)
        way = LoopbackChannel(trunk, name, greeting=greeting(Checkpoint(recipe.model.path), recipe))
        own = RoleDirectory(Path(temporary) / name)
        worker = Worker(recipe, name, own, trunk=way, root=known)
        try:
            worker.run()
        finally:
            worker.close()
        shared = root.load_round(rounds)["shared"]
    return capture_rows(target, name, rows, SharedAdapters(rounds, "", shared)).crossings, shared
