"""The trunk's service: dispatches each request of a silo to the component that answers it."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from google.protobuf.message import Message

from isthmus.errors import CutError, MismatchError, ModelError, ProtocolError, RunError
from isthmus.model import adapters
from isthmus.model.agreement import check_agreed, earlier_keys, hello_of
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part
from isthmus.model.device import find_device
from isthmus.recipe import Recipe
from isthmus.recipe.tree import check_named
from isthmus.storage.files import disk_errors, writing
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.adapter import ReplicaAdapters, SharedAdapter, TrunkAdapter
from isthmus.trunk.async_steps import AsyncSteps
from isthmus.trunk.batches import Backwards, Evaluation, Evaluations, Forwards
from isthmus.trunk.between import BetweenBlocks
from isthmus.trunk.codecs import Codecs
from isthmus.trunk.decoding import Decoding, SessionStep
from isthmus.trunk.earlier_answers import EarlierAnswers
from isthmus.trunk.kept_examples import KeptExamples
from isthmus.trunk.loading import load_trunk
from isthmus.trunk.ranks import Ranks
from isthmus.trunk.runner import Runner
from isthmus.trunk.scheduler import SINGLE, JobKind, Scheduler
from isthmus.trunk.sessions import Sessions
from isthmus.trunk.staged_runner import StagedRunner
from isthmus.trunk.sync_steps import SyncSteps
from isthmus.trunk.training import TrunkTraining
from isthmus.updates.between import BlocksChange
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from isthmus.wire.identity import Identity
from isthmus.wire.patience import Heard
from isthmus.wire.senders import check_sender
from isthmus.wire.vitals import Vitals

log = logging.getLogger(__name__)

QUEUED_FRAMES = 4
"""Largest frames whose bytes a silo's waiting requests may have together."""


class TrunkService:
    """Implements ``wire.channel.Service`` with the middle blocks of the recipe's model.

    Args:
        directory: the directory for the trunk's rounds, metrics and kept examples.
        checkpoint: the base model; the recipe's by default.
        identity: the trunk's; None: all parties are in this process, without certificates.
        added: silos that were added since the federation began (see ``earlier_keys``).
        replica: whether it serves a finished run beside other trunks: it trains nothing, and writes nothing.
        ranks: the processes that hold the blocks with this one; None: it holds them alone.

    Raises:
        RecipeError: torch has no device ``trunk.device`` on this machine.
        RankLostError: one of the ranks is gone.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: RoleDirectory,
        *,
        checkpoint: Checkpoint | None = None,
        identity: Identity | None = None,
        added: Collection[str] = (),
        replica: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        checkpoint = checkpoint or Checkpoint(recipe.model.path)
        cut = Cut(recipe.model.bottom, recipe.model.top)
        self._recipe = recipe
        self._hello = hello_of(recipe, checkpoint)
        self._hello.fingerprint = checkpoint.fingerprint
        self._earlier = earlier_keys(recipe, self._hello.keys, added)
        self._scheduler = Scheduler(QUEUED_FRAMES * recipe.wire.max_frame_bytes)
        self._ranks = ranks
        self._runner = self._scheduler.submit(lambda: _load_runner(checkpoint, cut, recipe, ranks)).result()
        runner = self._runner
        if recipe.lora.start is not None:
            _check_start(runner.part, directory, recipe.lora.start)
        self._kept = KeptExamples(directory.path / "kept", recipe, runner.crossing_width, runner.device)
        codecs, earlier = recipe.boundary.codec, None
        if recipe.boundary.differences:
            earlier = EarlierAnswers(directory.path / "answers", recipe, runner.width)
        self._codecs = Codecs(codecs, runner.crossing_width, runner.width, self._kept, runner.device, earlier)
        self._sessions = Sessions(self._runner, recipe.trunk, len(recipe.silo))
        self._scheduler.tidy = self._sessions.expire
        self._decoding = Decoding(self._runner, self._sessions, self._codecs, recipe.trunk.chunk)
        adapter = _trunk_adapter(self._runner, recipe)
        between = BetweenBlocks(adapter) if recipe.trains_between and isinstance(adapter, SharedAdapter) else None
        directory.keep_as(recipe.train)
        self._training = self._scheduler.submit(
            lambda: TrunkTraining(
                self._runner,
                adapter,
                directory,
                recipe.seed,
                longest=recipe.trunk.max_silo_norm,
                stash_bytes=recipe.trunk.stash_bytes,
                silos=len(recipe.silo),
                between=between,
            )
        ).result()
        self._forwards = Forwards(self._training, self._codecs, recipe.trunk, recipe.train.micro_batches)
        self._backwards = Backwards(self._training, self._codecs, recipe.trunk)
        self._evaluations = Evaluations(
            self._runner, self._codecs, recipe.trunk, crowded=lambda: len(self._scheduler.waiting) > 1
        )
        self._run = run_name(directory) if recipe.train.rounds else ""
        journal = directory.journal("metrics")
        self._heard = Heard(recipe.waits.silence if identity else math.inf)
        self._steps: SyncSteps | AsyncSteps
        if recipe.federation.asynchronous.buffer is None:
            self._steps = SyncSteps(self._training, self._scheduler, recipe, journal, self._heard)
        else:
            self._steps = AsyncSteps(
                self._training, self._scheduler, recipe, directory, journal, identity=identity, run=self._run
            )
        self._silos = frozenset(recipe.tree.silos)
        self._instances: dict[str, str] = {}
        self._last: dict[str, Answer] = {}
        """Answer to each silo's last request that changes the trunk's state."""
        self._compared: set[str] = set()
        """Silos that had a greeting compared."""
        self._ends: dict[str, int] = {}
        """The round of the adapters of each silo that infers and does not train."""
        self._answers: dict[type[Message], Callable[[str, Any], Answer]] = {
            pb.Hello: self._greet,
            pb.Ping: self._ping,
            pb.Begin: self._begin,
            pb.Commit: self._in_order(self._steps.commit),
            pb.End: self._in_order(self._steps.end),
            pb.Keep: self._keep,
            pb.Forward: self._forward,
            pb.Backward: self._backward,
            pb.Decode: self._decode,
            pb.Close: self._close,
        }
        self._replica, self._trains = replica, bool(recipe.train.rounds) and not replica
        if not self._trains:
            training = (pb.Begin, pb.Commit, pb.End, pb.Keep, pb.Backward)
            self._answers |= dict.fromkeys(training, self._refuse_training)

    def _refuse_training(self, peer: str, request: Message) -> Answer:
        if self._replica:
            raise ProtocolError(
                f"{peer} would train, but this trunk is a replica, which trains nothing",
                remedy="use the model without a gradient, or start 'isthmus trunk' without --replica, and it alone",
            )
        raise ProtocolError(
            f"{peer} would train, but by the recipe nothing does (train.rounds = 0)",
            remedy="use the model without a gradient, or give all parties a recipe with train.rounds",
        )

    def handle(self, peer: str, request: Message) -> Answer:
        check_sender("the trunk", "Trunk", "silo", request)
        self._heard.note(peer)
        greeted = peer in self._instances or (peer in self._compared and _changes_nothing(request))
        if not greeted and not isinstance(request, pb.Hello | pb.Ping):
            raise ProtocolError(
                f"received {type(request).__name__} before Hello", remedy="send Hello first on every stream"
            )
        return self._answers[type(request)](peer, request)

    def restore(self, number: int) -> None:
        """Restore the adapter at the end of this round. Call it before any silo connects."""
        self._scheduler.submit(lambda: self._training.restore(number)).result()

    def trained(self, round: int) -> Future[list[BlocksChange]]:
        """Implements ``updates.between.TrunkBlocks``."""
        return self._scheduler.submit_urgent(lambda: self._training.trained(round))

    def settle(self, completed: int, shared: Mapping[str, torch.Tensor]) -> Future[None]:
        """Implements ``updates.between.TrunkBlocks``."""
        if isinstance(self._steps, SyncSteps):
            self._steps.settled(completed)
        return self._scheduler.submit_urgent(lambda: self._training.settle(completed, shared))

    def vitals(self) -> Vitals:
        """Implements ``wire.vitals.Watched``."""
        waiting, held = self._scheduler.waiting, self._scheduler.waiting_bytes
        gauges = {
            "trunk_waiting_requests": sum(waiting.values()),
            "trunk_waiting_bytes": sum(held.values()),
            "trunk_sessions": len(self._sessions),
        }
        failure = "" if self._scheduler.alive else "the trunk's compute thread has ended"
        state = "failed" if failure else "computing" if waiting else "idle"
        return Vitals(state, self._training.completed, failure, gauges=gauges)

    def stop(self) -> None:
        """End the compute thread. Where ranks hold the blocks, wait for its end: they do one thing at a time."""
        self._scheduler.stop()
        if self._ranks is not None:
            self._scheduler.join()

    def _ping(self, peer: str, request: pb.Ping) -> Answer:
        """The answer to a ping; with a greeting to be compared the time and the trunk's round, if both sides agree.
        A process of the silo that has connected stays so."""
        if not request.HasField("compared"):
            return answered(pb.Pong())
        self._compare(peer, request.compared)
        self._compared.add(peer)
        return answered(pb.Pong(time=time.time(), welcome=self._welcome()))

    def _welcome(self) -> pb.Welcome:
        training = self._training
        return pb.Welcome(completed=training.completed, training=training.moved, run=self._run)

    def _compare(self, peer: str, hello: pb.Hello) -> None:
        """Raise ``MismatchError`` unless the silo has the trunk's model, shared keys and cut."""
        if hello.fingerprint != self._hello.fingerprint:
            raise MismatchError(
                f"{peer} and the trunk have different base models (configuration or weights differ)",
                remedy="give both sides the same files at model.path",
            )
        check_agreed(peer, hello.keys, "the trunk", self._hello.keys, self._earlier)
        if (hello.bottom, hello.top) != (own := self._recipe.ends(peer)):
            raise MismatchError(
                f"{peer} cuts at ({hello.bottom}, {hello.top}), by the trunk's recipe at {own}",
                remedy="use the same recipe on both sides",
            )

    def _greet(self, peer: str, hello: pb.Hello) -> Answer:
        self._compare(peer, hello)
        if self._instances.get(peer) != hello.instance:
            log.info("trunk: %s has connected%s", peer, " with another process" if peer in self._instances else "")
            self._instances[peer] = hello.instance
            self._steps.forget(peer)
            self._scheduler.submit_urgent(lambda: self._forget(peer))
        training = self._training
        self._ends.pop(peer, None)
        if hello.HasField("ends"):
            training.require_round(peer, hello.ends)
            self._ends[peer] = hello.ends
        return answered(self._welcome())

    def _forget(self, peer: str) -> None:
        self._scheduler.drop(
            peer, ProtocolError(f"another process of {peer} has connected", remedy="stop one of the two processes")
        )
        self._training.forget(peer)
        self._sessions.close_all(peer)

    def _keep(self, peer: str, request: pb.Keep) -> Answer:
        def job() -> Message:
            self._kept.write(peer, request)
            return pb.Kept()

        return self._scheduler.enqueue(SINGLE, (peer, "train"), job, request.ByteSize())

    def _in_order(self, answer_of: Callable[[str, Any], Answer]) -> Callable[[str, Any], Answer]:
        """A handler whose requests come after the silo's earlier ones, and take their turn if any is not answered.
        What it asks the scheduler for is urgent: so there is one such job a turn of the silo."""

        def handle(peer: str, request: Message) -> Answer:
            last = self._last.get(peer)
            if (last is None or last.done()) and peer not in self._scheduler.waiting:
                answer = answer_of(peer, request)
            else:
                answer = self._queued(peer, request, lambda: answer_of(peer, request))
            self._last[peer] = answer
            return answer

        return handle

    def _queued(self, peer: str, request: Message, work: Callable[[], Answer]) -> Answer:
        """The answer to what the scheduler does in the silo's turn."""
        answer = Answer()

        def turned(done: Answer) -> None:
            if done.exception() is not None:
                answer.set_exception(done.exception())

        def turn() -> None:
            work().add_done_callback(lambda done: _pass_on(done, answer))

        self._scheduler.enqueue(SINGLE, (peer, "train"), turn, request.ByteSize()).add_done_callback(turned)
        return answer

    def _begin(self, peer: str, request: pb.Begin) -> Answer:
        check_named(peer, request.participants, self._silos)
        self._check_rows(peer, request.steps)
        self._ends.pop(peer, None)
        return self._in_order(self._steps.begin)(peer, request)

    def _check_rows(self, peer: str, own: pb.Steps) -> None:
        """Raise ``ProtocolError`` if a silo claims more steps than its rows may make with ``train.epochs``."""
        if self._recipe.train.epochs is not None and own.total > (most := self._recipe.most_run_steps(peer)):
            raise ProtocolError(
                f"{peer} claims {own.total:,} steps in the run, the {self._recipe.most_rows(peer):,} rows that it may "
                f"have by the recipe make {most:,} in train.epochs = {self._recipe.train.epochs}",
                remedy=f"raise train.most_rows, or silo.most_rows of {peer}, for all parties",
            )

    def _forward(self, peer: str, request: pb.Forward) -> Answer:
        if request.train and not self._trains:
            return self._refuse_training(peer, request)
        if request.train:
            return self._scheduler.enqueue(self._forwards, (peer, "train"), (peer, request), request.ByteSize())
        lane = (peer, "train" if request.examples else "evaluate")  # examples are sent in the lane of training
        return self._inferred(peer, self._evaluations, lane, Evaluation(peer, request))

    def _backward(self, peer: str, request: pb.Backward) -> Answer:
        return self._scheduler.enqueue(self._backwards, (peer, "train"), (peer, request), request.ByteSize())

    def _decode(self, peer: str, request: pb.Decode) -> Answer:
        return self._inferred(peer, self._decoding, (peer, "session", request.session), SessionStep(peer, request))

    def _inferred(
        self, peer: str, kind: JobKind, lane: tuple[Hashable, ...], request: SessionStep | Evaluation
    ) -> Answer:
        """The answer to a request that does not train; an error if the adapter is or meanwhile was not of the round of
        the silo's own."""
        number = self._ends.get(peer)
        if number is None:
            return self._scheduler.enqueue(kind, lane, request, request.request.ByteSize())
        self._training.require_round(peer, number)
        changes, answer = self._training.changes, Answer()

        def settle(done: Answer) -> None:
            error = done.exception()
            if error is None and self._training.changes != changes:
                error = RunError(
                    f"the trunk trained while it answered {peer}", remedy="wait until the rounds have finished"
                )
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(done.result())

        self._scheduler.enqueue(kind, lane, request, request.request.ByteSize()).add_done_callback(settle)
        return answer

    def _close(self, peer: str, request: pb.Close) -> Answer:
        def close() -> Message:
            self._sessions.close(peer, request.session)
            return pb.Closed()

        return self._scheduler.enqueue(SINGLE, (peer, "session", request.session), close)


def _changes_nothing(request: Message) -> bool:
    """Whether a request is a forward without a backward, of hidden states that it holds itself."""
    return isinstance(request, pb.Forward) and not request.train and not request.examples


def _pass_on(done: Answer, answer: Answer) -> None:
    """Settle an answer with what another got."""
    error = done.exception()
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(done.result())


def run_name(directory: RoleDirectory) -> str:
    """The random name of the trunk's run, by which a silo recognizes the trunk that it was trained with.

    Raises:
        DiskFullError, RunError: it cannot be read or written, or is damaged.
    """
    path = directory.path / "run"
    with disk_errors(path):
        if not path.exists():
            with writing(path) as temporary:
                name = secrets.token_hex(8)
                temporary.write_text(f"{name} {_check_of(name)}\n", encoding="ascii")
        name, _, check = path.read_text(encoding="ascii", errors="replace").strip().partition(" ")
    if check != _check_of(name):
        raise RunError(f"the run's name in {path} is damaged", remedy="restore the file from a backup")
    return name


def _check_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _load_runner(checkpoint: Checkpoint, cut: Cut, recipe: Recipe, ranks: Ranks | None) -> Runner:
    device, residual = find_device(recipe.trunk.device), recipe.boundary.residual
    if ranks is None:
        part = load_trunk(checkpoint, cut, recipe, device)
        record = None if recipe.trunk.weights is None else False  # passes of few bits were never tried to record
        return Runner(part, residual=residual, record=record, passed=_passed_blocks(checkpoint, cut, recipe))
    ranks.load(cut)
    part = load_trunk(checkpoint, cut, recipe, device, ranks.share)
    ranks.wait_loaded()
    return StagedRunner(part, ranks, residual=residual, passed=_passed_blocks(checkpoint, cut, recipe))


def _passed_blocks(checkpoint: Checkpoint, cut: Cut, recipe: Recipe) -> dict[str, range]:
    """The blocks of the trunk that each silo's hidden states pass.

    Raises:
        CutError: a silo's own cut leaves none; it is named.
    """
    total: int = checkpoint.config.get_text_config().num_hidden_layers
    found = {}
    for move in recipe.model.moves or ():  # else it would turn out after all the rounds before
        Cut(move.get("bottom", cut.bottom), move.get("top", cut.top)).blocks("trunk", total)
    try:
        Cut(*recipe.widest).blocks("trunk", total)
    except CutError as error:
        raise CutError(
            f"no block of {total} is left that all silos leave to the trunk: the largest bottom has "
            f"{recipe.widest[0]}, the largest top {recipe.widest[1]}",
            remedy="lower silo.bottom or silo.top of the silos that keep most",
        ) from error
    for silo in recipe.silo:
        try:
            found[silo.name] = cut.passed(Cut(*recipe.ends(silo.name)), total)
        except CutError as error:
            raise CutError(
                f"{silo.name}: {error.message}", remedy=f"lower silo.bottom or silo.top of {silo.name}"
            ) from error
    return found


def _check_start(part: Part, directory: RoleDirectory, start: str) -> None:
    """Check that a run goes on from the adapter that it began with: factors that never train are not in later rounds.

    Raises:
        ModelError: the folder ``lora.start`` has another adapter than at the run's first start.
    """
    if not directory.rounds():
        return
    began, own = directory.load_round(0)["adapter"], adapters.adapter_of(part)
    if any(not torch.equal(began[name], one.cpu()) for name, one in own.items()):
        raise ModelError(
            f"{start} has another adapter than when this run began",
            remedy="put the first one back, or start a new run",
        )


def _trunk_adapter(runner: Runner, recipe: Recipe) -> TrunkAdapter:
    if recipe.trunk.adapter == "shared":
        passed = {silo.name: runner.passed(silo.name) for silo in recipe.silo}
        return SharedAdapter(runner.part, recipe.train, passed)
    return ReplicaAdapters(runner.part, recipe.train, recipe.trunk.average_every or recipe.train.steps)
