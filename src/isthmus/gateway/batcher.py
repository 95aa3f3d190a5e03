"""The batcher: requests join as they arrive, step together, and leave as they end."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from isthmus.errors import BusyError, IsthmusError, PeerGoneError
from isthmus.gateway.conversations import KeptConversations
from isthmus.gateway.generation import Generation, GenerationRequest, PieceSink
from isthmus.gateway.steps import GatewaySteps, ending, keeps_sessions
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.draft import Draft
from isthmus.tasks.greedy import Decode, generation_processors

log = logging.getLogger(__name__)
LOST_LOOK_SECONDS = 5.0
"""Time between two looks of an idle gateway whether the trunk is there."""


class Batcher:
    """Steps all running requests together, on the thread that calls ``run``: the one that loaded the model.

    Decoding requests step in one pass. Prompts on their way do not hold them up, nor do those that wait for room.

    Args:
        decode: token ids as text, without control tokens.
        together: most answers that are written at a time.
        waiting: most requests that wait for room.
        conversations: most conversations whose sessions are kept for their next turn; 0: none.
        lease: seconds that one is kept: the trunk's lease of its session.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        together: int = 16,
        waiting: int = 64,
        conversations: int = 0,
        lease: float = 600.0,
    ) -> None:
        self.together = together
        self._decode, self._most = decode, waiting
        self._model: SplitForCausalLM | None = None
        self._lock = threading.Lock()
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._wake: Future[None] = Future()
        self._stopping = False
        self._keeping = conversations > 0
        self._kept = KeptConversations(conversations, lease)

    @property
    def open(self) -> bool:
        """Whether requests are taken."""
        return self._model is not None

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of requests that run and that wait."""
        return len(self._running), len(self._waiting)

    def submit(self, request: GenerationRequest, notify: PieceSink) -> Generation:
        """Take a request, from any thread.

        Raises:
            BusyError: too many wait.
            PeerGoneError: there is no connection to the trunk now.
        """
        with self._lock:
            if self._model is None:
                raise PeerGoneError("there is no connection to the trunk", remedy="send it again in a while")
            processors = generation_processors(self._model, len(request.prompt))
            kept = self._keeping and request.answers == 1 and keeps_sessions(self._model)
            generation = Generation(request, notify, self._decode, processors, kept=kept)
            self._waiting.append(generation)
            if (without := self._without_room()) > self._most:
                self._waiting.pop()
                raise BusyError(f"{without - 1} requests wait already", remedy="send it again in a few seconds")
        self._awake()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for it any more: it ends before its next step."""
        if not generation.ended and not generation.cancelled:
            generation.cancelled = True
            self._awake()

    def stop(self) -> None:
        """Let ``run`` return, from any thread; what is under way ends with an error."""
        self._stopping = True
        self._awake()

    def run(self, model: SplitForCausalLM, draft: Draft | None = None) -> None:
        """Step with this model until ``stop``, or until its connection to the trunk is over.

        Args:
            draft: the silo's draft model; None: it has none.
        """
        steps = GatewaySteps(model, draft)
        gone: IsthmusError = BusyError("the gateway stops", remedy="send it again later")
        self._model = model
        try:
            while not self._stopping:
                self._admit()
                self._step(steps)
                self._keep()
                if (not self._running or any(one.failed for one in self._running)) and steps.lost():
                    gone = PeerGoneError("the trunk is gone", remedy="send it again in a while")
                    return
                self._running = [one for one in self._running if not one.ended]
        finally:
            self._end_all(gone)

    def _step(self, steps: GatewaySteps) -> None:
        ready = [one for one in self._running if one.step is None]
        if ready:
            with ending(*ready):
                steps.send(ready)
        self._await_answers()
        done = [one for one in self._running if one.step is not None and one.step.sent.answer.done()]
        if done:
            with ending(*done):
                steps.receive(done)

    def _admit(self) -> None:
        """Let requests run that there is room for, oldest first; end those that nobody waits for."""
        with self._lock:
            for one in [one for one in (*self._running, *self._waiting) if one.cancelled]:
                one.end()
            self._keep()
            self._running = [one for one in self._running if not one.ended]
            self._waiting = deque(one for one in self._waiting if not one.ended)
            while self._waiting and self._room(self._waiting[0]):
                self._running.append(self._waiting.popleft())
                self._resume(self._running[-1])
            self._wake = Future()

    def _resume(self, generation: Generation) -> None:
        """Let a request go on with a kept conversation, if one begins as it does."""
        request = generation.request
        found = self._kept.take(request.owner, request.prompt) if request.answers == 1 else None
        if found is not None:
            generation.resume(found)

    def _keep(self) -> None:
        """Keep the sessions of requests that have ended, for their next turns."""
        self._kept.expire()
        for one in self._running:
            if (kept := one.keep()) is not None:
                self._kept.put(one.request.owner, kept)

    def _room(self, generation: Generation) -> bool:
        taken = sum(len(one.rows) for one in self._running)
        return not taken or taken + len(generation.rows) <= self.together

    def _without_room(self) -> int:
        """Number of those that wait for which there is no room yet."""
        taken = sum(len(one.rows) for one in self._running)
        for place, one in enumerate(self._waiting):
            if taken and taken + len(one.rows) > self.together:
                return len(self._waiting) - place
            taken += len(one.rows)
        return 0

    def _await_answers(self) -> None:
        """Wait until all decoding steps are answered; without any, for a prompt's answer or a new request."""
        steps = {one.step.sent.answer: one for one in self._running if one.step is not None}
        if self._stopping:
            return
        decoding = [answer for answer, one in steps.items() if not one.prompting]
        if decoding:
            wait(decoding)
        else:
            known: list[Future[Any]] = [*steps, self._wake]
            wait(known, timeout=LOST_LOOK_SECONDS, return_when=FIRST_COMPLETED)

    def _end_all(self, error: IsthmusError) -> None:
        with self._lock:
            self._model = None
            for one in (*self._running, *self._waiting):
                one.end(error)
            self._running.clear()
            self._waiting.clear()
            self._kept.clear()

    def _awake(self) -> None:
        with self._lock:
            if not self._wake.done():
                self._wake.set_result(None)
