"""Drafting tokens for speculative decoding: the trunk verifies several in one round trip.

Each token comes from the source with the best acceptance rate: the bridge, or a look-up in the text or in the silo's
earlier answers. transformers' assisted decoding then keeps the tokens that the split model itself generates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from isthmus.model.cache import SplitCache
from isthmus.model.split import SplitForCausalLM
from isthmus.model.transcript import Transcript
from isthmus.silo.drafting.bridge import Bridge, BridgeSession, restrict_head
from isthmus.silo.drafting.draft_length import MAX_DRAFT, AcceptanceRate, Costs, DraftLength, worthwhile
from isthmus.silo.drafting.lookup import Lookup

CONFIDENCE_BINS = 10
"""Number of equal intervals of the bridge's own probability, each with an acceptance rate."""
Corpus = Sequence[tuple[list[int], int]]
"""Token ids of texts, each with the index of its first indexed token (the answer's first)."""
EXPECTED, NO_MATCH = "bridge where ", "nothing"
"""Parts of the names of the bridge's expected acceptance rates, one for each result of the look-up."""
INITIAL_ACCEPTANCE = {"prompt": (0.1, 0.3, 0.5, 0.6), "corpus": (0.05, 0.2, 0.3, 0.4)}
"""Initial acceptance rates of looked-up tokens, by source, for 1 to 4 tokens of context."""


@dataclass(frozen=True)
class Proposal:
    """A token proposed by one source for the next position."""

    source: str
    """The source's name in ``Sources.rates``."""
    token: int
    """The token id."""


@dataclass
class Sources:
    """The acceptance rate of each source, kept across generations."""

    rates: dict[str, AcceptanceRate] = field(default_factory=dict)
    """Acceptance rates by the source's name."""

    def __post_init__(self) -> None:
        for name, rates in INITIAL_ACCEPTANCE.items():
            for size, rate in enumerate(rates, 1):
                self.rates[f"{name} {size}"] = AcceptanceRate(4 * rate, 4)
        for found in (NO_MATCH, *self.rates):
            self.rates[EXPECTED + found] = AcceptanceRate(2.0, 4)
        for number in range(CONFIDENCE_BINS):
            rate = (number + 0.5) / CONFIDENCE_BINS
            self.rates[f"bridge {number}"] = AcceptanceRate(4 * rate, 4)

    def acceptance(self, proposal: Proposal | None) -> float:
        """The probability, 0 to 1, that a proposal is accepted; 0 for None."""
        return self.rates[proposal.source].value if proposal else 0.0

    def note(self, proposal: Proposal, token: int) -> None:
        """Add the split model's own token where this proposal was made."""
        self.rates[proposal.source].note(proposal.token == token)


class Draft(SplitForCausalLM):
    """The draft model, passed to the split model's ``generate`` as ``assistant_model``.

    Args:
        model: the split model; the draft shares its bottom and top.
        bridge: takes the trunk's place.
        vocabulary: token ids that the bridge may propose.
        corpus: the silo's earlier answers, for the look-up.
    """

    def __init__(self, model: SplitForCausalLM, bridge: Bridge, vocabulary: torch.Tensor, corpus: Corpus = ()) -> None:
        super().__init__(model.config, model.bottom, bridge, restrict_head(model.top, vocabulary))
        self.vocabulary = vocabulary
        self.corpus = Lookup()
        for ids, start in corpus:
            self.corpus.add(ids, start)
        self.draft_length = DraftLength()
        self.sources = Sources()
        self.clock: Callable[[], float] = time.perf_counter
        self.eval()

    def candidates(self, cache: SplitCache, processors: Any, generation_config: Any) -> Candidates:
        """A candidate generator for one generation, called by the split model's ``generate``."""
        return Candidates(self, cache, processors, generation_config)


class RecordedSession(Protocol):
    """What drafts read of a generation: a ``SplitCache``, or what stands for one."""

    @property
    def session(self) -> object:
        """Its session: another one once the generation has begun again from its first token."""
        ...

    def start_transcript(self) -> Transcript:
        """Record all further hidden states exchanged with the trunk."""
        ...


@dataclass
class DraftedToken:
    """A token of a draft."""

    token: int
    """The token id."""
    acceptance: float
    """The probability that it is accepted, if all before it are."""
    proposals: tuple[Proposal, ...]
    """All proposals for its position; their sources are rated by the split model's token."""


class Candidates(CandidateGenerator):
    """Drafts for one generation. Implements transformers' ``CandidateGenerator``.

    It returns no candidate logits, so that with sampling, too, the split model's own tokens are kept.
    """

    def __init__(self, draft: Draft, cache: RecordedSession, processors: Any, generation_config: Any) -> None:
        self._draft = draft
        self._drafter = BridgeDrafter(draft, cache, processors)
        self._text = Lookup()
        self._indexed = 0
        self._longest: int = generation_config.max_length
        ends = generation_config._eos_token_tensor
        self._ends = set() if ends is None else set(ends.flatten().tolist())
        self._sent: list[DraftedToken] = []
        self._trips = 0
        self._sent_at = 0.0
        self.bridging = True
        """Whether the bridge may draft; otherwise tokens are looked up alone."""

    @torch.no_grad()
    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """The text so far with the drafted tokens appended, ``[1, L + drafted]``, and None in place of logits.

        Args:
            input_ids: the text so far, ``[1, L]``.
        """
        ids: list[int] = input_ids[0].tolist()
        self._text.add(ids, self._indexed)
        self._indexed = len(ids)
        started = self._draft.clock()
        self._drafter.start(len(ids))
        self._sent = self._draft_tokens(ids)
        self._drafter.stop()
        self._sent_at = self._draft.clock()
        if self._trips:
            self._draft.draft_length.note_draft(self._drafter.proposed, self._sent_at - started)
        new = input_ids.new_tensor([[candidate.token for candidate in self._sent]])
        return torch.cat([input_ids, new], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: Any, num_matches: int) -> None:
        """Update acceptance rates and times from the split model's new tokens, the last of ``input_ids``."""
        if self._trips:  # the prompt's round trip takes longer than later ones
            self._draft.draft_length.note_trip(len(self._sent) + 1, self._draft.clock() - self._sent_at)
        self._trips += 1
        new = input_ids[0, self._indexed :].tolist()
        for candidate, token in zip(self._sent, new, strict=False):
            for proposal in candidate.proposals:
                self._draft.sources.note(proposal, token)

    def _draft_tokens(self, ids: list[int]) -> list[DraftedToken]:
        """Drafted tokens, as many as raise the expected tokens per second."""
        costs, drafted = self._draft.draft_length.costs, list[DraftedToken]()
        reach, tokens, seconds = 1.0, 1.0, costs.round_trip + costs.per_verified_token
        while len(drafted) < min(MAX_DRAFT, self._longest - len(ids) - 1):
            before = self._drafter.proposed
            text = [*ids, *(one.token for one in drafted)]
            candidate = self._next_token(text, reach, tokens, seconds, costs)
            seconds += costs.per_drafted_token * (self._drafter.proposed - before)
            if candidate is None or candidate.token in self._ends:
                break
            reach *= candidate.acceptance
            if not worthwhile(reach, tokens, seconds, costs.per_verified_token):
                break
            drafted.append(candidate)
            tokens, seconds = tokens + reach, seconds + costs.per_verified_token
        return drafted

    def _next_token(
        self, ids: list[int], reach: float, tokens: float, seconds: float, costs: Costs
    ) -> DraftedToken | None:
        """The best token after ``ids``, or None if no source has one. The bridge runs only if it is worthwhile.

        Args:
            reach: the probability that all drafted tokens so far are accepted.
            tokens, seconds: expected tokens and seconds of the round trip so far.
        """
        sources, proposals = self._draft.sources, self._looked_up(ids)
        found = max(proposals, key=sources.acceptance, default=None)
        expected = EXPECTED + (found.source if found else NO_MATCH)
        known, expected_rate = sources.acceptance(found), sources.rates[expected].value
        gain = reach * (expected_rate - known) / max(0.1, 1 - expected_rate)  # an accepted token allows further ones
        use_bridge = (
            self.bridging and self._drafter.ready and worthwhile(gain, tokens, seconds, costs.per_drafted_token)
        )
        if use_bridge:
            proposals = [*proposals, self._drafter.propose(ids)]
        if not proposals:
            return None
        best = max(proposals, key=sources.acceptance)
        error = 1.0
        for proposal in proposals:
            error *= 1 - sources.acceptance(proposal) if proposal.token == best.token else 1.0
        scored = [*proposals, Proposal(expected, proposals[-1].token)] if use_bridge else proposals
        return DraftedToken(best.token, 1 - error, tuple(scored))

    def _looked_up(self, ids: list[int]) -> list[Proposal]:
        found = {"prompt": self._text.find(ids), "corpus": self._draft.corpus.find(ids)}
        return [Proposal(f"{name} {hit[1]}", hit[0]) for name, hit in found.items() if hit]


class BridgeDrafter:
    """Drafts tokens with the bridge, from the trunk's answers so far and the bridge's predictions after them.

    Args:
        cache: the split model's cache; the trunk's answers are read from its transcript.
        processors: logits processors of the generation.
    """

    def __init__(self, draft: Draft, cache: RecordedSession, processors: Any) -> None:
        self._draft = draft
        self._processors = processors
        self._transcript = cache.start_transcript()
        self._split_cache = cache
        self._begin()
        self._answered = 0
        self._padded = False
        self.ready = False
        """Whether the bridge can propose tokens: after the trunk's first answer, and if the row has no padding."""
        self.proposed = 0
        """Number of tokens proposed since ``start``."""

    def start(self, length: int) -> None:
        """Start a draft after ``length`` tokens; the trunk has answered all but the last."""
        self.proposed = 0
        if self._split_cache.session is not self._session:
            self._begin()
        self._answered = len(self._transcript)
        self.ready = 0 < self._answered == length - 1 and not self._padded
        if self.ready:
            answered = self._transcript.slice(self._processed)
            self._padded = not bool(answered.real_BL.all())
            self.ready = not self._padded
            session = self._cache.session
            assert isinstance(session, BridgeSession)
            session.set_answers(answered.g_BLD[0])

    def _begin(self) -> None:
        """Begin with an empty cache; again when the split model has dropped its own."""
        self._session = self._split_cache.session
        self._cache = self._draft.new_cache()
        self._cache.activate_past_recording()
        self._processed = 0

    def propose(self, ids: Sequence[int]) -> Proposal:
        """The draft model's most probable token after ``ids``."""
        self._cache.drafted = self._processed > 0  # as the split model computes them
        new_1L = torch.tensor([ids[self._processed :]], device=self._draft.device)
        logits_1W = self._draft(new_1L, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.proposed += 1
        self._processed = len(ids)
        vocabulary = self._draft.vocabulary
        logits_1V = logits_1W.new_full((1, self._draft.config.vocab_size), -torch.inf, dtype=torch.float32)
        logits_1V[:, vocabulary] = logits_1W.float()
        if self._processors:
            logits_1V = self._processors(new_1L.new_tensor([list(ids)]), logits_1V)
        probability, token = logits_1V[0].softmax(dim=-1).max(dim=-1)
        return Proposal(f"bridge {min(CONFIDENCE_BINS - 1, int(probability * CONFIDENCE_BINS))}", int(token))

    def stop(self) -> None:
        """Crop the draft model's cache to the positions that the trunk has answered."""
        if self._processed > self._answered:
            self._cache.crop(self._answered - self._processed)
            self._processed = self._answered
