"""The steps of many generations, taken together: one pass of bottom, one frame a generation, one pass of top.

What crosses is what crosses in ``SplitForCausalLM.outbound`` with a cache, row by row.

Shapes: L new tokens of one sequence, T those of a generation that cross, D the model's width, W the width that crosses,
K positions that are scored, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from isthmus.errors import IsthmusError
from isthmus.gateway.generation import Generation, StepState, WrittenRow
from isthmus.gateway.packed_ends import EndCaches, NewTokens, PackedEnds
from isthmus.model.crossing import Reply
from isthmus.model.rope import by_length
from isthmus.model.split import SplitForCausalLM
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.remote import RemoteTrunk
from isthmus.wire import isthmus_pb2 as pb

log = logging.getLogger(__name__)


def keeps_sessions(model: SplitForCausalLM) -> bool:
    """Whether a later turn may go on with a session: all tokens cross, and what is computed for a token depends on
    nothing but the tokens before it."""
    return model.tail is None and model.shield is None and not by_length(model.config)


class GatewaySteps:
    """Moves generations on. One thread calls it.

    Args:
        draft: the silo's draft model; None: it has none.
    """

    def __init__(self, model: SplitForCausalLM, draft: Draft | None = None) -> None:
        assert isinstance(model.trunk, RemoteTrunk)
        self._model, self._trunk = model, model.trunk
        self._draft = draft if model.shield is None and model.tail is None else None
        self._ends = PackedEnds(model)

    @torch.no_grad()
    def send(self, generations: Sequence[Generation]) -> None:
        """Begin a step of each; one whose step cannot begin ends with the error."""
        ready = [one for one in generations if self._prepared(one, alone=len(generations) == 1)]
        if not ready:
            return
        feeds = [self._feeds(one) for one in ready]
        outputs = iter(self._through_bottom(ready, feeds))
        for one, own in zip(ready, feeds, strict=True):
            h_LDs = [next(outputs) for _ in own]
            with ending(one):
                self._send(one, own, h_LDs)

    @torch.no_grad()
    def receive(self, generations: Sequence[Generation]) -> None:
        """Finish the steps of generations whose answers have come; each gets its tokens, or ends with an error."""
        known: list[tuple[Generation, StepState, list[torch.Tensor]]] = []
        for one in generations:
            assert one.step is not None
            assert one.session is not None
            with ending(one):
                known.append((one, one.step, self._top_inputs(one, one.step, one.session.receive(one.step.sent))))
        if not known:
            return
        g_LDs = [g_LD for _, _, own in known for g_LD in own]
        feeds = [feed for _, step, _ in known for feed in step.feeds]
        scored = [1 + (len(one.drafts) if one.cached else 0) for one, step, _ in known for _ in step.feeds]
        logits = iter(self._ends.through_top(g_LDs, feeds, scored))
        for one, step, _ in known:
            own = [next(logits) for _ in step.feeds]
            with ending(one):
                self._choose(one, step, own)

    def lost(self) -> bool:
        """Whether the connection to the trunk is over: it has to be opened again."""
        try:
            self._trunk.channel.submit(pb.Ping())
        except IsthmusError:
            return True
        return False

    def _prepared(self, one: Generation, *, alone: bool) -> bool:
        """Make a generation ready for its next step; one that cannot be ends with the error."""
        with ending(one):
            self._prepare(one, alone=alone)
        return not one.ended

    def _prepare(self, one: Generation, *, alone: bool) -> None:
        """Open a session where one is needed, and draft."""
        if one.session is None:
            one.session = self._trunk.open_session()
            one.rows[0].caches = self._ends.new_caches()
        elif self._drops(one):
            one.restart(self._trunk.open_session())
            for row in one.rows:
                row.caches = self._ends.new_caches()
        if not one.cached and self._model.shield is not None:
            one.shielded = DynamicCache(config=self._model.bottom.config)
        prompting = len(one.known(one.rows[0])) - one.cached > 1  # the prompt's length decides its own frequencies
        one.drafts = [] if prompting else self._drafted(one, alone=alone)

    def _drops(self, one: Generation) -> bool:
        """Whether the next token's length is the first after which the family drops its cache (``model.rope``)."""
        switch = self._model.recomputed_after
        return switch is not None and 0 < one.cached <= switch < len(one.known(one.rows[0]))

    def _drafted(self, one: Generation, *, alone: bool) -> list[int]:
        """Drafted tokens. Among several generations none costs a pass of the draft model: they are looked up."""
        if self._draft is None or one.request.answers > 1:
            return []
        if one.candidates is None:
            one.draft_with(self._draft)
        assert one.candidates is not None
        known = one.known(one.rows[0])
        one.candidates.bridging = alone
        ids_1L, _ = one.candidates.get_candidates(torch.tensor([known], device=self._model.device))
        limits = [self._model.context, self._model.recomputed_after or self._model.context]
        room = max(0, min(limit for limit in limits if limit >= len(known)) - len(known))
        return ids_1L[0, len(known) :].tolist()[:room]

    def _feeds(self, one: Generation) -> list[NewTokens]:
        """The new tokens of each row."""
        rows = one.rows if one.cached or one.rows[0].given else one.rows[:1]  # a prompt is computed once
        return [NewTokens([*one.known(row)[one.cached :], *one.drafts], _caches(row), bool(one.drafts)) for row in rows]

    def _through_bottom(
        self, generations: Sequence[Generation], feeds: Sequence[list[NewTokens]]
    ) -> list[torch.Tensor]:
        if self._model.shield is None:
            return self._ends.through_bottom([feed for own in feeds for feed in own])
        shielded = (self._through_shield(one, own) for one, own in zip(generations, feeds, strict=True))
        return [h_LD for h_BLD in shielded for h_LD in h_BLD]

    def _through_shield(self, one: Generation, feeds: list[NewTokens]) -> torch.Tensor:
        """Bottom's output of one generation, whose rows are of one length, ``[B, L, D]``."""
        assert self._model.shield is not None
        ids_BL = torch.tensor([feed.ids for feed in feeds], device=self._model.device)
        mask_BP = ids_BL.new_ones(len(feeds), one.cached + ids_BL.shape[1])
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BP, "past_key_values": one.shielded, "use_cache": True}
        return self._model.shield.hidden(self._model.bottom, one.session, **inputs)

    def _send(self, one: Generation, feeds: list[NewTokens], h_LDs: list[torch.Tensor]) -> None:
        assert one.session is not None
        tail = None if one.cached else self._model.tail
        crossing = [len(feed.ids) if tail is None else min(tail, len(feed.ids)) for feed in feeds]
        subjects = one.session.subjects([feed.ids for feed in feeds], crossing)
        h_TD = torch.cat([h_LD[len(h_LD) - count :] for h_LD, count in zip(h_LDs, crossing, strict=True)])
        h_TW = h_TD if self._model.bottleneck is None else self._model.bottleneck.narrow(h_TD)
        sent = one.session.send(h_TW, subjects, crossing, drafted=feeds[0].drafted)
        one.step = StepState(feeds, h_LDs, crossing, sent)

    def _top_inputs(self, one: Generation, step: StepState, reply: Reply) -> list[torch.Tensor]:
        """Top's input at each row's new positions, ``[L, D]``; without a residual path only at those that crossed."""
        g_TD, bottleneck = reply.g_TD, self._model.bottleneck
        if bottleneck is not None:
            crossed = zip(step.h_LDs, step.crossing, strict=True)
            h_TD = torch.cat([h_LD[len(h_LD) - count :] for h_LD, count in crossed])
            g_TD = bottleneck.join(h_TD, g_TD, reply.noise_TW)
        g_LDs = list(torch.split(g_TD, step.crossing))
        if self._model.residual:
            pairs = zip(step.h_LDs, g_LDs, strict=True)
            g_LDs = [torch.cat([h_LD[: len(h_LD) - len(g_LD)], g_LD]) for h_LD, g_LD in pairs]
        if one.transcript is not None or (self._draft is not None and one.request.answers == 1):
            real_1L = torch.ones(1, len(g_LDs[0]), dtype=torch.bool)
            one.start_transcript().add(step.h_LDs[0][None], g_LDs[0][None], real_1L)
        return g_LDs

    def _choose(self, one: Generation, step: StepState, logits: list[torch.Tensor]) -> None:
        """Choose the rows' tokens, and keep of caches and session what belongs to them."""
        one.step = None
        prompted, sent = len(step.feeds) < len(one.rows), len(step.feeds[0].ids)
        one.cached += sent
        if one.drafts:
            self._verify(one, logits[0])
        else:
            for place, row in enumerate(one.rows):
                row.choose(logits[0 if prompted else place][-1])
        if prompted:
            self._branch(one)
        before = list(one.rows)
        one.report()
        if not one.ended and len(one.rows) < len(before):
            self._select(one, [before.index(row) for row in one.rows])

    def _verify(self, one: Generation, logits_KV: torch.Tensor) -> None:
        """Choose tokens as long as they are the drafted ones, and forget the positions of wrong drafts."""
        row, drafts, right = one.rows[0], one.drafts, 0
        one.drafts = []
        for place in range(len(drafts) + 1):
            token = row.choose(logits_KV[place])
            if row.finish is not None or place == len(drafts) or token != drafts[place]:
                break
            right += 1
        wrong = len(drafts) - right
        if wrong:
            one.cached -= wrong
            _caches(row).crop(wrong)
            assert one.session is not None
            one.session.crop(wrong)
            assert one.transcript is not None
            one.transcript.crop(wrong)
        assert one.candidates is not None
        known_1L = torch.tensor([one.known(row)], device=self._model.device)
        one.candidates.update_candidate_strategy(known_1L, None, right)

    def _branch(self, one: Generation) -> None:
        """After the prompt: caches for each answer, and rows of the session."""
        first = _caches(one.rows[0])
        for row in one.rows[1:]:
            row.caches = first.copy()
        self._select(one, [0] * len(one.rows))

    def _select(self, one: Generation, rows: list[int]) -> None:
        assert one.session is not None
        one.session.select(rows)
        if one.shielded is not None:
            one.shielded.batch_select_indices(torch.tensor(rows))


@contextmanager
def ending(*generations: Generation) -> Iterator[None]:
    """An error within the block ends these generations, and nothing else. The message of one that nobody expected may
    hold text: it is not logged."""
    try:
        yield
    except IsthmusError as error:
        known = error
    except Exception as error:
        log.error("gateway: a step failed: %s", type(error).__name__)
        known = IsthmusError(f"the step failed: {type(error).__name__}", remedy="send the request again")
    else:
        return
    for one in generations:
        one.end(known)


def _caches(row: WrittenRow) -> EndCaches:
    assert row.caches is not None
    return row.caches
