"""The generations of one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from isthmus.gateway.batcher import Batcher
from isthmus.gateway.exchange import ClientExchange, ClientGone, begun
from isthmus.gateway.generation import AnswerPiece, GenerationRequest
from isthmus.gateway.problems import Problem
from isthmus.gateway.responses import Usage
from isthmus.gateway.sampling import SamplingSettings
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.oracle.gateway import batching

GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture
def batcher(split: Split, tmp_path: Path) -> Iterator[Batcher]:
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")))
    with batching(model, together=2, waiting=1) as found:
        yield found


async def stays() -> MutableMapping[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def leaves() -> MutableMapping[str, Any]:
    await asyncio.sleep(0.05)
    return {"type": "http.disconnect"}


async def collected(exchange: ClientExchange) -> list[AnswerPiece]:
    return [piece async for piece in await begun(exchange.pieces())]


def request(longest: int, answers: int = 1) -> GenerationRequest:
    return GenerationRequest([4, 5, 6], longest, settings=GREEDY, answers=answers)


def test_pieces_of_all_prompts(batcher: Batcher) -> None:
    exchange = ClientExchange(batcher, [request(3, 2), request(3, 2)], stays, 1e-5)
    pieces = asyncio.run(collected(exchange))
    assert {piece.answer for piece in pieces} == {0, 1, 2, 3}
    assert exchange.usage == Usage(6, 12)
    assert exchange.charge.releases == 6


def test_a_client_that_leaves(batcher: Batcher) -> None:
    with pytest.raises(ClientGone):
        asyncio.run(collected(ClientExchange(batcher, [request(400)], leaves, 1e-5)))
    assert asyncio.run(collected(ClientExchange(batcher, [request(2)], stays, 1e-5)))


def test_one_that_is_turned_away_ends_the_others(batcher: Batcher) -> None:
    """What had left for them is in the error's headers."""
    exchange = ClientExchange(batcher, [request(100), request(100), request(100), request(100)], stays, 1e-5)
    with pytest.raises(Problem) as found:
        asyncio.run(collected(exchange))
    assert found.value.status == 503
    assert int(found.value.headers["X-Isthmus-Releases"]) == exchange.charge.releases
    assert exchange.usage.written < 300
    assert asyncio.run(collected(ClientExchange(batcher, [request(2)], stays, 1e-5)))
