"""One answer as it is written: when it ends, and which pieces it gives."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList

from isthmus.errors import BusyError
from isthmus.gateway.generation import AnswerPiece, Generation, GenerationEnd, GenerationRequest
from isthmus.gateway.sampling import SamplingSettings
from tests.oracle.gateway import Collected, words

GREEDY = SamplingSettings(temperature=0.0)


def started(**how: Any) -> tuple[Generation, Collected]:
    sink = Collected()
    request = GenerationRequest(**{"prompt": [1], "longest": 4, "settings": GREEDY} | how)
    return Generation(request, sink, words, LogitsProcessorList()), sink


def write(generation: Generation, *tokens: int) -> None:
    """Let the first row choose these."""
    for token in tokens:
        logits = torch.zeros(30)
        logits[token] = 1.0
        generation.rows[0].choose(logits)
        generation.report()


def test_the_longest_answer() -> None:
    generation, sink = started()
    write(generation, 5, 6, 7, 8)
    assert (sink.ids, sink.finishes) == ([[5, 6, 7, 8]], ["length"])
    assert sink.end == GenerationEnd((), 4)


def test_a_token_that_ends_is_counted_and_not_text() -> None:
    generation, sink = started(ends=[9])
    write(generation, 5, 9)
    assert (sink.ids, sink.finishes) == ([[5]], ["stop"])
    assert sink.end == GenerationEnd((), 2)


def test_a_stop_is_no_text_and_its_tokens_are_not_noted() -> None:
    generation, sink = started(stop=[" 6 7"], likeliest=1)
    write(generation, 5, 6, 7)
    assert (sink.ids, sink.finishes) == ([[5]], ["stop"])
    assert [token.scored.token for piece in sink.pieces for token in piece.tokens] == [5]
    assert sink.end == GenerationEnd((), 3)


def test_one_piece_where_nobody_streams() -> None:
    generation, sink = started(streamed=False)
    write(generation, 5, 6, 7, 8)
    assert sink.pieces == [AnswerPiece(0, " 5 6 7 8", (), "length")]


def test_it_ends_once() -> None:
    generation, sink = started()
    error = BusyError("busy", remedy="wait")
    generation.end(error)
    generation.end()
    assert sink.end is not None
    assert (sink.end.error, generation.failed) == (error, True)
