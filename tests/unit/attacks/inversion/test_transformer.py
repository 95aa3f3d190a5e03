"""The learned attacks: what they read, that padding is nothing to them, and that they learn what they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from isthmus.attacks.inversion.decoder import Decoder, DecoderSettings, invert_by_decoder
from isthmus.attacks.inversion.published import PublishedSettings, run_published_decoder
from isthmus.attacks.inversion.transformer import Inverter, InverterSettings, invert_by_transformer
from isthmus.attacks.knowledge import Knowledge
from isthmus.attacks.view.view import Crossing, KnownPair, View
from isthmus.errors import AttackError
from tests.conftest import VOCABULARY
from tests.unit.attacks.attacked import Attacked, Truth, random_rows
from tests.unit.attacks.inversion.test_matching import changed

QUICK: dict[str, Any] = {"width": 32, "heads": 2, "blocks": 1, "others": 32}


def accuracy(found: list[list[int]], truth: Truth) -> float:
    return sum(
        one == two for row, other in zip(found, truth, strict=True) for one, two in zip(row, other, strict=False)
    ) / sum(map(len, truth))


def ahead(view: View, own: int) -> tuple[View, Truth]:
    """A made-up boundary: at each position crosses a code of the token that stands there and of the one before, mixed
    with the position before it so that no linear map of one vector tells them apart."""
    code_VD = torch.randn(VOCABULARY, 48, generator=torch.Generator().manual_seed(9))

    def crossing(tokens: tuple[int, ...]) -> Crossing:
        now_LD = code_VD[torch.tensor(tokens)]
        before_LD = torch.cat([torch.zeros(1, 48), now_LD[:-1]])
        return Crossing("x", "train", 1, before_LD + 0.01 * now_LD)

    mine, yours = ([(*row.prompt, *row.answer) for row in random_rows(n, s)] for n, s in ((own, 7), (8, 8)))
    pairs = tuple(KnownPair(tokens, crossing(tokens)) for tokens in mine)
    return replace(view, pairs=pairs, crossings=tuple(map(crossing, yours))), [list(row) for row in yours]


@torch.no_grad()
def test_neighbours_in_a_batch_and_padding_change_nothing(attacked: Attacked) -> None:
    view, _ = attacked(own=20)
    knowledge = Knowledge(view)
    rows = [crossing.hidden_LD for crossing in view.crossings]
    inverter = Inverter(
        knowledge.linear, torch.cat(rows), knowledge.embedding, InverterSettings(width=32, heads=2)
    ).eval()
    torch.nn.init.normal_(inverter._out.weight)
    alone = torch.cat([inverter.directions([row]) for row in rows])
    assert torch.allclose(inverter.directions(rows), alone, atol=1e-4)


@torch.no_grad()
def test_the_decoder_sees_what_was_said_and_nothing_that_is_to_come(attacked: Attacked) -> None:
    view, _ = attacked(own=4)
    rows = [crossing.hidden_LD for crossing in view.crossings[:2]]
    decoder = Decoder(Knowledge(view).language_model, torch.cat(rows), DecoderSettings(width=32, heads=2)).eval()
    torch.nn.init.normal_(decoder._out.weight)
    ids_BW = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 7]])
    whole_BWE = decoder.directions(rows, decoder.read(ids_BW))
    first_BWE = decoder.directions(rows, decoder.read(ids_BW[:, :2]))
    assert torch.allclose(whole_BWE[:, :2], first_BWE, atol=1e-4)
    assert not torch.allclose(whole_BWE[0, 1], whole_BWE[1, 1], atol=1e-2)
    alone_BWE = decoder.directions(rows[1:], decoder.read(ids_BW[1:]))
    assert torch.allclose(whole_BWE[1:], alone_BWE, atol=1e-4)
    other_BWE = decoder.directions([rows[1], rows[1]], decoder.read(ids_BW))
    assert not torch.allclose(whole_BWE[0], other_BWE[0], atol=1e-2)


@torch.no_grad()
def test_writing_with_a_cache_is_reading_everything_anew(attacked: Attacked) -> None:
    view, _ = attacked(own=4)
    rows = [crossing.hidden_LD for crossing in view.crossings[:3]]
    decoder = Decoder(Knowledge(view).language_model, torch.cat(rows), DecoderSettings(width=32, heads=2)).eval()
    torch.nn.init.normal_(decoder._out.weight)
    for row, found in zip(rows, decoder.generate(rows, [6, 7, 8]), strict=True):
        ids = [decoder.begin]
        for _ in range(8):
            said_BWE = decoder.read(torch.tensor([ids]))
            ids.append(int(decoder.scores(said_BWE, decoder.directions([row], said_BWE))[0, -1].argmax()))
        assert found == ids[1 : 1 + len(found)]
        assert len(found) in (6, 7, 8) or ids[1 + len(found)] == decoder.end


def test_the_transformer_reads_what_stands_beside(attacked: Attacked) -> None:
    view, truth = ahead(attacked()[0], 400)
    knowledge = Knowledge(view)
    linear = [knowledge.linear.best(crossing.hidden_LD, 1)[:, 0].tolist() for crossing in view.crossings]
    found = invert_by_transformer(knowledge, InverterSettings(epochs=25, learning_rate=3e-3, **QUICK | {"width": 64}))
    assert accuracy(found, truth) > accuracy(linear, truth) + 0.2


def test_an_untrained_transformer_is_the_linear_inverter(attacked: Attacked) -> None:
    view, _ = attacked(noise=0.2)
    knowledge = Knowledge(view)
    linear = [knowledge.linear.best(crossing.hidden_LD, 1)[:, 0].tolist() for crossing in view.crossings]
    assert invert_by_transformer(knowledge, InverterSettings(epochs=0, **QUICK)) == linear


def test_the_decoder_writes_rows_of_which_only_the_end_crosses(attacked: Attacked) -> None:
    """Each row says one token several times over: what crosses of the end tells how it began."""
    view, _ = attacked()
    knowledge = Knowledge(view)

    def row(number: int) -> tuple[int, ...]:
        return (4 + number % 7,) * (3 + number % 2)

    def crossing(tokens: tuple[int, ...]) -> Crossing:
        return Crossing("x", "train", 1, knowledge.bottom_of(tokens)[-1:])

    pairs = tuple(KnownPair(row(number), crossing(row(number))) for number in range(80))
    rows = [row(number) for number in range(14)]
    short = replace(view, pairs=pairs, crossings=tuple(map(crossing, rows)))
    found = invert_by_decoder(Knowledge(short), DecoderSettings(epochs=30, learning_rate=3e-3, **QUICK))
    assert accuracy(found, [list(one) for one in rows]) > 0.8


def test_the_published_attack_learns_what_comes_next_and_mended_what_is_there(attacked: Attacked) -> None:
    view, _ = attacked()
    recipe = view.recipe
    chain = [tuple(4 + (start + 3 * place) % 90 for place in range(8)) for start in range(90)]
    knowledge = Knowledge(view)
    pairs = tuple(KnownPair(row, Crossing("x", "train", 1, knowledge.bottom_of(row))) for row in chain)
    known = Knowledge(replace(view, recipe=recipe, pairs=pairs, crossings=tuple(pair.crossing for pair in pairs[:8])))
    truth = [list(row) for row in chain[:8]]
    schedule = PublishedSettings(steps=500, rows=8, learning_rate=3e-3)
    published = run_published_decoder(known, schedule)
    mended = run_published_decoder(known, replace(schedule, mended=True))
    assert accuracy(mended, truth) > 0.9
    assert accuracy(published, truth) < 0.3
    assert accuracy([row[:-1] for row in published], [row[1:] for row in truth]) > 0.9


def test_the_published_attack_needs_whole_vectors(attacked: Attacked) -> None:
    view, _ = attacked()
    for matrix, last in ((torch.eye(32)[:, :20], None), (torch.eye(32), 1)):
        with pytest.raises(AttackError, match="all tokens at the model's width"):
            run_published_decoder(Knowledge(changed(view, matrix, last)))
