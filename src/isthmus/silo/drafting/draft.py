"""Drafts: tokens guessed within the silo and sent to the trunk together, so that one round trip may bring several.

Each token is guessed by what promises more at its place: the bridge, or looking up how the text, or the silo's earlier
answers, went on. transformers' own assisted decoding then keeps what the split model itself would have said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from isthmus.model.cache import SplitCache
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.bridge import Bridge, BridgeSession, narrow
from isthmus.silo.drafting.draft_length import MOST, Costs, DraftLength, Share, pays
from isthmus.silo.drafting.lookup import Lookup

BINS = 10
"""Classes of the bridge's own confidence."""
Corpus = Sequence[tuple[list[int], int]]
"""Texts in tokens, and from where on in each (the answer) it is remembered."""
HOPE, NOTHING = "bridge where ", "nothing"
"""The bridge's acceptance before it is asked, by what looking up found: places differ in how hard they are."""
FIRST_TRUST = {"prompt": (0.1, 0.3, 0.5, 0.6), "corpus": (0.05, 0.2, 0.3, 0.4)}
"""What share of looked-up tokens is taken to be right before any was tried, by tokens of context."""


@dataclass(frozen=True)
class Guess:
    """One source's token for a place."""

    source: str
    token: int


@dataclass
class Sources:
    """How often each source was right lately; kept from one generation to the next."""

    shares: dict[str, Share] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shares in FIRST_TRUST.items():
            for size, share in enumerate(shares, 1):
                self.shares[f"{name} {size}"] = Share(4 * share, 4)
        for found in (NOTHING, *self.shares):
            self.shares[HOPE + found] = Share(2.0, 4)
        for number in range(BINS):
            share = (number + 0.5) / BINS
            self.shares[f"bridge {number}"] = Share(4 * share, 4)

    def trust(self, guess: Guess | None) -> float:
        """The probability that a guess is right."""
        return self.shares[guess.source].value if guess else 0.0

    def note(self, guess: Guess, token: int) -> None:
        """What the split model said where this was guessed."""
        self.shares[guess.source].note(guess.token == token)


class Draft(SplitForCausalLM):
    """The draft model: give it to the split model's ``generate`` as ``assistant_model``.

    Args:
        model: whose bottom and top it shares.
        bridge: in the trunk's place.
        words: the tokens that the bridge may guess.
        corpus: the silo's earlier answers, to look up how a text may go on.
    """

    def __init__(self, model: SplitForCausalLM, bridge: Bridge, words: torch.Tensor, corpus: Corpus = ()) -> None:
        super().__init__(model.config, model.bottom, bridge, narrow(model.top, words))
        self.words = words
        self.corpus = Lookup()
        for ids, start in corpus:
            self.corpus.learn(ids, start)
        self.draft_length = DraftLength()
        self.sources = Sources()
        self.clock: Callable[[], float] = time.perf_counter
        self.eval()

    def candidates(self, cache: SplitCache, processors: Any, generation_config: Any) -> Candidates:
        """What guesses for one generation; the split model's ``generate`` asks for it."""
        return Candidates(self, cache, processors, generation_config)


@dataclass
class Place:
    """A drafted token, and what each source that was asked guessed there."""

    token: int
    trust: float
    guesses: tuple[Guess, ...]


class Candidates(CandidateGenerator):
    """Drafts for one generation. Implements transformers' ``CandidateGenerator``.

    No candidate logits are given, so that when sampling, too, the split model's own choices are what is kept.
    """

    def __init__(self, draft: Draft, cache: SplitCache, processors: Any, generation_config: Any) -> None:
        self._draft = draft
        self._ahead = Ahead(draft, cache, processors)
        self._text = Lookup()
        self._learned = 0
        self._longest: int = generation_config.max_length
        ends = generation_config._eos_token_tensor
        self._ends = set() if ends is None else set(ends.flatten().tolist())
        self._places: list[Place] = []
        self._trips = 0
        self._left = 0.0

    @torch.no_grad()
    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """The text so far ``[1, L]`` with the drafted tokens after it."""
        ids: list[int] = input_ids[0].tolist()
        self._text.learn(ids, self._learned)
        self._learned = len(ids)
        started = self._draft.clock()
        self._ahead.start(len(ids))
        self._places = self._drafted(ids)
        self._ahead.stop()
        self._left = self._draft.clock()
        if self._trips:
            self._draft.draft_length.note_draft(self._ahead.asked, self._left - started)
        new = input_ids.new_tensor([[place.token for place in self._places]])
        return torch.cat([input_ids, new], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: Any, num_matches: int) -> None:
        """Learn from what the split model said; ``input_ids`` ends with it."""
        if self._trips:  # the prompt's own trip is longer than those to come
            self._draft.draft_length.note_trip(len(self._places) + 1, self._draft.clock() - self._left)
        self._trips += 1
        said = input_ids[0, self._learned :].tolist()
        for place, token in zip(self._places, said, strict=False):
            for guess in place.guesses:
                self._draft.sources.note(guess, token)

    def _drafted(self, ids: list[int]) -> list[Place]:
        """Tokens for as long as one more raises the expected tokens a second."""
        costs, places = self._draft.draft_length.costs, list[Place]()
        reach, tokens, seconds = 1.0, 1.0, costs.round_trip + costs.verified
        while len(places) < min(MOST, self._longest - len(ids) - 1):
            asked = self._ahead.asked
            place = self._place([*ids, *(place.token for place in places)], reach, tokens, seconds, costs)
            seconds += costs.drafted * (self._ahead.asked - asked)
            if place is None or place.token in self._ends:
                break
            reach *= place.trust
            if not pays(reach, tokens, seconds, costs.verified):
                break
            places.append(place)
            tokens, seconds = tokens + reach, seconds + costs.verified
        return places

    def _place(self, ids: list[int], reach: float, tokens: float, seconds: float, costs: Costs) -> Place | None:
        """The likeliest token after ``ids``. The bridge is asked where it promises more than it costs."""
        sources, guesses = self._draft.sources, self._looked_up(ids)
        found = max(guesses, key=sources.trust, default=None)
        hope = HOPE + (found.source if found else NOTHING)
        known, hoped = sources.trust(found), sources.shares[hope].value
        gain = reach * (hoped - known) / max(0.1, 1 - hoped)  # a hit opens the way to the tokens after it
        asked = self._ahead.ready and pays(gain, tokens, seconds, costs.drafted)
        if asked:
            guesses = [*guesses, self._ahead.guess(ids)]
        if not guesses:
            return None
        best = max(guesses, key=sources.trust)
        doubt = 1.0
        for guess in guesses:
            doubt *= 1 - sources.trust(guess) if guess.token == best.token else 1.0
        lessons = [*guesses, Guess(hope, guesses[-1].token)] if asked else guesses
        return Place(best.token, 1 - doubt, tuple(lessons))

    def _looked_up(self, ids: list[int]) -> list[Guess]:
        found = {"prompt": self._text.find(ids), "corpus": self._draft.corpus.find(ids)}
        return [Guess(f"{name} {hit[1]}", hit[0]) for name, hit in found.items() if hit]


class Ahead:
    """The draft model's run ahead of the split model, on the trunk's answers as far as there are any.

    Args:
        cache: the split model's; it gets a transcript, on which the trunk's answers are read.
    """

    def __init__(self, draft: Draft, cache: SplitCache, processors: Any) -> None:
        self._draft = draft
        self._processors = processors
        self._transcript = cache.start_transcript()
        self._cache = draft.new_cache()
        self._cache.activate_past_recording()
        self._fed = 0
        self._sure = 0
        self._padded = False
        self.ready = False
        """Whether the bridge can be asked: not before the trunk's first answer, nor in a padded row."""
        self.asked = 0
        """Tokens drafted since ``start``."""

    def start(self, length: int) -> None:
        """A draft after this many tokens, all but the last of which the trunk has answered."""
        self.asked = 0
        self._sure = len(self._transcript)
        self.ready = 0 < self._sure == length - 1 and not self._padded
        if self.ready:
            heard = self._transcript.slice(self._fed)
            self._padded = not bool(heard.real_BL.all())
            self.ready = not self._padded
            session = self._cache.session
            assert isinstance(session, BridgeSession)
            session.hear(heard.g_BLD[0])

    def guess(self, ids: Sequence[int]) -> Guess:
        """The draft model's next token."""
        new_1L = torch.tensor([ids[self._fed :]], device=self._draft.device)
        logits_1W = self._draft(new_1L, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.asked += 1
        self._fed = len(ids)
        words = self._draft.words
        logits_1V = logits_1W.new_full((1, self._draft.config.vocab_size), -torch.inf, dtype=torch.float32)
        logits_1V[:, words] = logits_1W.float()
        if self._processors:
            logits_1V = self._processors(new_1L.new_tensor([list(ids)]), logits_1V)
        probability, token = logits_1V[0].softmax(dim=-1).max(dim=-1)
        return Guess(f"bridge {min(BINS - 1, int(probability * BINS))}", int(token))

    def stop(self) -> None:
        """Forget what was fed beyond the trunk's answers."""
        if self._fed > self._sure:
            self._cache.crop(self._sure - self._fed)
            self._fed = self._sure
