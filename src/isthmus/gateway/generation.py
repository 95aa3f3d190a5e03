"""One prompt and its answers, from the request to the last token.

Shapes: L new tokens of one sequence, D the model's width, K positions that are scored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

import torch
from transformers import DynamicCache, LogitsProcessorList

from isthmus.errors import IsthmusError
from isthmus.gateway.answer_text import AnswerText
from isthmus.gateway.conversations import KeptConversation
from isthmus.gateway.packed_ends import EndCaches, NewTokens
from isthmus.gateway.sampling import SamplingSettings, ScoredToken, TokenChooser
from isthmus.model.transcript import Transcript
from isthmus.privacy.events import Release
from isthmus.silo.drafting.draft import Candidates, Draft
from isthmus.silo.session import RemoteSession, SentStep

if TYPE_CHECKING:  # of the extra ``gateway``, which a conversation in the terminal does without
    from isthmus.gateway.answer_grammar import AnswerGrammar

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked."""

    prompt: list[int]
    """In token ids, at least one."""
    longest: int
    """Most tokens of an answer."""
    ends: Collection[int] = ()
    """Tokens that end an answer."""
    stop: Sequence[str] = ()
    """Texts before which an answer ends."""
    answers: int = 1
    """The prompt crosses once for all of them."""
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    likeliest: int | None = None
    """Number of likeliest tokens to note at each place; None: no log-probabilities."""
    streamed: bool = True
    """Whether pieces are given as they come; otherwise each answer is one piece, at its end."""
    grammar: AnswerGrammar | None = None
    """What answers are held to; None: nothing."""
    owner: int = 0
    """Whose kept conversations it may go on with."""


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token of an answer, with the place in the answer's text where it begins."""

    scored: ScoredToken
    place: int


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """The next piece of an answer."""

    answer: int
    """Its number, from 0."""
    text: str
    tokens: tuple[PlacedToken, ...] = ()
    """Those that the text is of; empty where none are noted."""
    finish: Finish | None = None
    """Why the answer ended; None: it goes on."""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """No more pieces come."""

    releases: tuple[Release, ...]
    """What left the silo for it."""
    written: int
    """Number of tokens of all answers, those included that ended them."""
    error: IsthmusError | None = None
    """Why it ended early; None: all answers are whole."""
    reused: int = 0
    """Number of the prompt's tokens that did not cross again."""


PieceSink = Callable[[AnswerPiece | GenerationEnd], None]
"""Takes pieces as they come, on the batcher's thread: it must not block."""


class WrittenRow:
    """One answer as it is written."""

    def __init__(
        self, number: int, request: GenerationRequest, decode: Callable[[list[int]], str], chooser: TokenChooser
    ) -> None:
        self.number = number
        self.given: list[int] = []
        """Its tokens, without the one that ended it."""
        self.written = 0
        """Number of tokens chosen, with the one that ended it."""
        self.caches: EndCaches | None = None
        self.finish: Finish | None = None
        self._request, self._chooser = request, chooser
        self._text = AnswerText(decode if request.grammar is None else request.grammar.decode, request.stop)
        self._noted: list[PlacedToken] = []

    def choose(self, logits_V: torch.Tensor) -> int:
        """Choose the next token; may end the answer."""
        scored = self._chooser.choose(self._request.prompt, self.given, logits_V)
        self.written += 1
        if scored.token in self._request.ends:
            self.finish = "stop"
        else:
            self._chooser.take(scored.token)
            self.given.append(scored.token)
            self._noted.append(PlacedToken(scored, self._text.add(scored.token)))
            if self._text.stopped or self._chooser.complete:
                self.finish = "stop"
            elif self.written == self._request.longest:
                self.finish = "length"
        if self.finish is not None:
            self._text.finish()
        return scored.token

    def piece(self) -> AnswerPiece | None:
        """What is certain and was not given yet; None: nothing."""
        if self.finish is None and not self._request.streamed:
            return None
        text = self._text.take(ended=self.finish is not None)
        if not text and self.finish is None:
            return None
        noted, self._noted = self._noted, []
        kept = () if self._request.likeliest is None else tuple(noted)
        if self.finish is not None and self._text.stopped:
            kept = tuple(one for one in kept if one.place < len(self._text.text))
        return AnswerPiece(self.number, text, kept, self.finish)


@dataclass
class StepState:
    """A step whose answer has not been read."""

    feeds: list[NewTokens]
    """Of each row."""
    h_LDs: list[torch.Tensor]
    """Bottom's output at each row's new tokens."""
    crossing: list[int]
    """Number of each row's last new tokens that cross."""
    sent: SentStep


class Generation:
    """A request under way. ``GatewaySteps`` moves it; only ``cancelled`` may be set by other threads.

    Args:
        decode: token ids as text, without control tokens.
        processors: what the model's own generation settings make of logits.
        kept: whether its session stays open when it ends without an error between two steps, for ``keep``. It has one
            answer then.
    """

    def __init__(
        self,
        request: GenerationRequest,
        notify: PieceSink,
        decode: Callable[[list[int]], str],
        processors: LogitsProcessorList,
        *,
        kept: bool = False,
    ) -> None:
        self._kept, self._begun = kept, 0
        self._first = request.prompt
        self.reused = 0
        """Number of the prompt's tokens that need not cross: those of a kept conversation."""
        self.request, self.processors = request, processors
        self.cancelled = False
        """Whether nobody waits for it any more."""
        self.rows = [
            WrittenRow(
                number,
                request,
                decode,
                TokenChooser(
                    request.settings,
                    processors,
                    answer=number,
                    likeliest=request.likeliest,
                    rule=None if request.grammar is None else request.grammar.begin(request.ends),
                ),
            )
            for number in range(request.answers)
        ]
        self.session: RemoteSession | None = None
        self.shielded: DynamicCache | None = None
        """Bottom's cache where a shield runs it; else each row has its own."""
        self.cached = 0
        """Number of positions in bottom's caches: the same for all rows."""
        self.step: StepState | None = None
        self.drafts: list[int] = []
        """Tokens drafted for the next step, of the only row."""
        self.candidates: Candidates | None = None
        self.transcript: Transcript | None = None
        self.ended = False
        self.failed = False
        """Whether it ended with an error."""
        self._notify, self._earlier = notify, list[Release]()
        self.finished: list[WrittenRow] = []
        """Rows that have ended."""

    @property
    def prompting(self) -> bool:
        """Whether the prompt, or with a new session all text so far, is on its way or comes next."""
        return not self.cached or not all(row.written for row in self.rows)

    def known(self, row: WrittenRow) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt, *row.given]

    def restart(self, session: RemoteSession) -> None:
        """Go on with a new session, which has no positions yet."""
        self.leave()
        self.session, self._begun, self.cached, self.reused = session, 0, 0, 0
        if self.transcript is not None:
            self.transcript.crop(len(self.transcript))

    def resume(self, kept: KeptConversation) -> None:
        """Go on with the session of a conversation whose tokens begin this one's prompt."""
        self.session, self._begun, self._first = kept.session, len(kept.session.releases), kept.first
        self.cached = self.reused = len(kept.tokens)
        self.rows[0].caches, self.transcript = kept.caches, kept.transcript

    def keep(self) -> KeptConversation | None:
        """What it leaves behind for ``resume``, once; None: nothing."""
        if not self.ended or self.session is None:
            return None
        (row,) = (*self.finished, *self.rows)
        assert row.caches is not None
        tokens = self.known(row)[: self.cached]
        session, self.session = self.session, None
        return KeptConversation(self._first, tokens, session, row.caches, self.transcript)

    def leave(self) -> None:
        """Free the trunk's memory."""
        if self.session is not None:
            self._note_releases()
            with suppress(IsthmusError):  # a trunk that is gone has forgotten it
                self.session.abandon()
            self.session = None

    def draft_with(self, draft: Draft) -> None:
        """Draft this generation's tokens from now on."""
        ends = torch.tensor(sorted(self.request.ends)) if self.request.ends else None
        longest = SimpleNamespace(max_length=len(self.request.prompt) + self.request.longest, _eos_token_tensor=ends)
        self.candidates = Candidates(draft, self, self.processors, longest)

    def start_transcript(self) -> Transcript:
        """Implements ``silo.drafting.draft.RecordedSession``."""
        self.transcript = self.transcript or Transcript()
        return self.transcript

    def report(self) -> None:
        """Give what the rows have; those that have ended leave."""
        for row in self.rows:
            piece = row.piece()
            if piece is not None:
                self._notify(piece)
        self.finished += [row for row in self.rows if row.finish is not None]
        self.rows = [row for row in self.rows if row.finish is None]
        if not self.rows:
            self.end()

    def end(self, error: IsthmusError | None = None) -> None:
        """Say that nothing more comes, and why."""
        if self.ended:
            return
        self.ended, self.failed = True, error is not None
        if self._kept and error is None and self.step is None and self.cached:
            self._note_releases()
        else:
            self.leave()
        written = sum(row.written for row in (*self.finished, *self.rows))
        self._notify(GenerationEnd(tuple(self._earlier), written, error, self.reused))

    def _note_releases(self) -> None:
        assert self.session is not None
        self._earlier += self.session.releases[self._begun :]
        self._begun = len(self.session.releases)
