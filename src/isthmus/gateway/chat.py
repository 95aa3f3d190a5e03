"""A conversation with a run's model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from typing import TextIO

from isthmus.data.templates import Turn, chat_example
from isthmus.data.tokens import ending_tokens, prompt_tokens
from isthmus.engines.inference import connected_silo, load_draft, stop_tokens
from isthmus.errors import DataError, IsthmusError
from isthmus.gateway.conversations import KeptConversation
from isthmus.gateway.generation import AnswerPiece, Generation, GenerationEnd, GenerationRequest, PieceSink
from isthmus.gateway.privacy_charge import PrivacyCharge
from isthmus.gateway.sampling import SamplingSettings
from isthmus.gateway.steps import GatewaySteps
from isthmus.privacy.events import Release
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.join import Silo
from isthmus.storage.record import RunDirectory
from isthmus.tasks.greedy import generation_processors

HELP = "/privacy: what has left the silo; /new: another conversation; /exit: the end"
Write = Callable[[str], None]
"""Shows a piece of text."""


class Conversation:
    """Turns of a person and the model. What has crossed is not sent again: the next turn goes on with the same session,
    unless the model's template writes earlier turns otherwise by then, or only tails of prompts cross.

    Args:
        draft: the silo's draft model; None: it has none.
        longest: most tokens of an answer.
        temperature: 0: the likeliest token at each place.
        system: its first turn; empty: none.

    Raises:
        ModelError: the model has no chat template.
    """

    def __init__(
        self, silo: Silo, draft: Draft | None = None, *, longest: int, temperature: float = 0.0, system: str = ""
    ) -> None:
        self._silo, self._steps, self._longest = silo, GatewaySteps(silo.model, draft), longest
        self._settings = SamplingSettings(temperature)
        self._system = [Turn("system", system)] if system else []
        self._turns: list[Turn] = []
        self._whole = silo.model.tail is None and silo.model.shield is None
        self._last: KeptConversation | None = None
        """What the last answer left behind, for the next one."""
        self._releases: list[Release] = []
        prompt_tokens(chat_example([Turn("user", "a")]), silo.tokenizer)

    @property
    def charge(self) -> PrivacyCharge:
        """What has left for all conversations so far."""
        return PrivacyCharge.of(self._releases, self._silo.boundary.budget.delta)

    def begin(self) -> None:
        """Begin another conversation."""
        self._turns = []
        self._forget()

    def ask(self, text: str, write: Write) -> str:
        """The model's answer, which is written as it comes.

        Raises:
            DataError: the text cannot be read, or the conversation has become too long.
            BudgetExhausted: the privacy budget does not allow it. The turn is as if it had not been.
        """
        example = chat_example([*self._system, *self._turns, Turn("user", text)])
        ids = prompt_tokens(example, self._silo.tokenizer)
        room = self._silo.model.context - len(ids)
        if room < 1:
            raise DataError(f"the conversation has {len(ids)} tokens: too many for the model", remedy="begin with /new")
        ends = stop_tokens(self._silo.model, ending_tokens(example, self._silo.tokenizer)) or ()
        pieces: list[str] = []

        def show(piece: AnswerPiece | GenerationEnd) -> None:
            if isinstance(piece, GenerationEnd):
                self._releases += piece.releases
                failed.append(piece.error)
            else:
                pieces.append(piece.text)
                write(piece.text)

        failed: list[IsthmusError | None] = []
        request = GenerationRequest(ids, min(room, self._longest), ends, settings=self._settings)
        last = self._generate(request, show)
        if failed[0] is not None:
            raise failed[0]
        self._last = last.keep()
        self._turns += [Turn("user", text), Turn("assistant", "".join(pieces))]
        return self._turns[-1].content

    def _generate(self, request: GenerationRequest, notify: PieceSink) -> Generation:
        """Step by step, in this thread."""
        processors = generation_processors(self._silo.model, len(request.prompt))
        generation = Generation(request, notify, self._decode, processors, kept=self._whole)
        if self._last is not None and self._last.shared(request.prompt) == len(self._last.tokens):
            generation.resume(self._last)
            self._last = None
        self._forget()
        while not generation.ended:
            self._steps.send([generation])
            if generation.step is not None:
                wait([generation.step.sent.answer])
                self._steps.receive([generation])
        return generation

    def _forget(self) -> None:
        """Give up the session."""
        if self._last is not None:
            self._last.leave()
        self._last = None

    def _decode(self, ids: list[int]) -> str:
        return str(self._silo.tokenizer.decode(ids, skip_special_tokens=True))


def converse(
    run: RunDirectory,
    name: str | None,
    *,
    longest: int,
    temperature: float = 0.0,
    system: str | None = None,
    trunk: str | None = None,
    round: str | int | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Talk with a run's model at the terminal, or answer lines of standard input one by one.

    Args:
        name, trunk, round: as in ``opening.open_run``.
        longest, temperature: as in ``Conversation``.
        system: the conversations' first turn; None: the recipe's.
        notify: called with notes and errors beside the output.

    Raises:
        ModelError: the model has no chat template.
        RunError, PeerGoneError: as ``opening.open_run``.
    """
    with connected_silo(run, name, trunk=trunk, round=round, notify=notify) as (silo, directory):
        first = run.recipe().task.system if system is None else system
        draft = load_draft(directory, silo)
        conversation = Conversation(silo, draft, longest=longest, temperature=temperature, system=first)
        if sys.stdin.isatty():
            notify(HELP)
        for line in _lines(sys.stdin):
            if line == "/exit":
                return
            _reply(conversation, silo, line, notify)


def _reply(conversation: Conversation, silo: Silo, line: str, notify: Write) -> None:
    if line == "/new":
        conversation.begin()
    elif line == "/privacy":
        print(privacy_line(conversation.charge, silo))
    elif line.startswith("/"):
        notify(f"no such command: {line.split()[0]}. {HELP}")
    elif line:
        try:
            conversation.ask(line, lambda piece: print(piece, end="", flush=True))
        except IsthmusError as error:
            notify(f"error: {error}")
        print(flush=True)


def privacy_line(charge: PrivacyCharge, silo: Silo) -> str:
    """What has left the silo since the command began, and what its records have cost in all."""
    since, budget = charge.headers(), silo.boundary.budget
    worst = PrivacyCharge(0, 0, budget.epsilon, budget.delta).headers()
    return (
        f"since the start: {charge.releases:,} releases, {charge.bytes:,} bytes, epsilon {since['X-Isthmus-Epsilon']}; "
        f"the silo's costliest record in all: epsilon {worst['X-Isthmus-Epsilon']} (delta {budget.delta:g})"
    )


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines as they are typed, or as they come in a pipe, without white space around them."""
    if not stream.isatty():
        for line in stream:
            yield line.strip()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit lines; nothing is kept on disk
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
