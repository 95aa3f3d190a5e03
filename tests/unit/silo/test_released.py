"""Released once: later epochs send numbers; nothing is drawn, charged or computed a second time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from isthmus import errors
from isthmus.data.tokens import Tokens, collate
from isthmus.silo.join import join
from isthmus.silo.pipeline import pipelined_step
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import save_tiny_model
from tests.unit.silo.parties import EPOCHS, HEADER, MATRIX, PER_ROW, ROWS, TOKENS, WIDTH, Start, batches


@pytest.mark.parametrize("codec_name", ["fp32", "int8+zstd"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_later_epochs_send_numbers_only(start: Start, micro_batches: int, codec_name: str) -> None:
    party = start(codec=codec_name)
    party.epoch(micro_batches=micro_batches)
    assert sorted(party.charged()) == sorted(TOKENS)
    assert [request.hidden.rows for request in party.kept()] == TOKENS
    assert sum(party.ran) == len(ROWS)
    for _ in range(EPOCHS - 1):
        party.forget()
        party.epoch(micro_batches=micro_batches)
        assert (party.charged(), party.hidden_bytes(), party.kept(), party.ran) == ([], 0, [], [])
        forwards = party.tap.take(pb.Forward)
        assert len(forwards) == 2 * micro_batches
        for request in forwards:
            assert not request.HasField("hidden")
            assert frames.wrap(request, id=2**20).ByteSize() <= HEADER + PER_ROW * len(request.lengths)
        assert not any(request.reply for request in party.tap.take(pb.Backward))


def test_the_backward_gets_no_bytes_back(start: Start) -> None:
    party = start()
    party.epoch()
    before = party.tap.received_bytes
    outbound = party.silo.model.outbound(torch.tensor([[5, 6, 7]]), {"use_cache": False}, {})
    forward = party.trunk.send(outbound)
    party.trunk.receive(forward)
    party.trunk.receive(party.trunk.send_gradient(forward, torch.ones(3, WIDTH), reply=False))
    assert party.tap.received_bytes - before <= 3 * MATRIX + 100  # the forward's answer alone


def test_ledger_and_frames_correspond_one_to_one(start: Start) -> None:
    party = start(noise=0.07)
    party.epoch()
    on_wire = [(m.hidden.rows, m.hidden.width, len(m.hidden.data)) for m in party.kept()]
    noted = [release for release in party.ledger.releases if release.path == "forward"]
    assert [(release.rows, release.width, release.size) for release in noted] == on_wire
    assert {release.noise for release in noted} == {0.07}
    assert party.silo.boundary.released_bytes["forward"] == party.hidden_bytes()


@torch.no_grad()
def test_what_leaves_is_noised_and_without_noise_is_what_bottom_gives(start: Start) -> None:
    noised, exact = start(noise=0.1), start(noise=0.0)
    for party in (noised, exact):
        party.logits()
    drawn = []
    for row, one, other in zip(ROWS, noised.kept(), exact.kept(), strict=True):
        h_TD = exact.silo.model.bottom.hidden(input_ids=torch.tensor([row.prompt + row.answer[:-1]]), use_cache=False)[
            0
        ]
        sent = [codec.decode(m.hidden, rows=len(h_TD), width=WIDTH, codec="fp32") for m in (one, other)]
        assert torch.allclose(sent[1], h_TD, atol=1e-5)
        drawn.append(sent[0] - h_TD)
    assert torch.cat(drawn).std() == pytest.approx(0.1, rel=0.1)


def test_a_row_is_known_however_it_is_padded_and_wherever_it_comes(start: Start) -> None:
    party = start()
    first = party.logits([ROWS[1], ROWS[0], ROWS[0]])
    assert party.charged() == [TOKENS[1], TOKENS[0]]
    again = party.logits([ROWS[0]])
    assert len(party.kept()) == 2
    assert torch.allclose(first[1], again[0], atol=1e-4)
    assert torch.allclose(first[1], first[2], atol=1e-5)


def test_other_text_is_released(start: Start) -> None:
    party = start()
    party.logits([Tokens([4, 5], [6, 2])])
    party.logits([Tokens([4], [5, 6, 2])])  # the same text, cut elsewhere into prompt and answer
    party.logits([Tokens([4, 5], [7, 2])])
    party.logits([Tokens([4, 5], [6, 6, 2])])
    assert party.charged() == [3, 3, 4]
    assert len({request.example for request in party.kept()}) == 3


def test_generation_is_as_ever(start: Start) -> None:
    party = start()
    ids = torch.tensor([ROWS[0].prompt])
    for _ in range(2):
        party.forget()
        party.silo.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert party.charged() == [3, 1, 1]
        assert len(party.tap.take(pb.Decode)) == 3
        assert not party.kept()


def test_all_micro_batches_are_sent_before_the_first_answer_is_needed(start: Start) -> None:
    party = start()
    pipelined_step(party.silo.model, party.optimizer, batches(4)[0], 2)
    kinds = [type(request).__name__ for request in party.tap.sent[1:]]
    assert kinds == ["Keep", "Keep", "Forward"] * 2 + ["Backward"] * 2


def test_numbers_tell_secret_text_model_and_mechanism_apart(start: Start, tmp_path: Path) -> None:
    party = start()
    row = [4, 5, 6], 3
    assert party.boundary.released.number(*row) != party.boundary.released.number([4, 5, 6], 2)
    again = [party.boundary.released.number(*row) for _ in range(2)]
    assert again[0] == again[1]
    secret = party.folder / "silo" / "released" / "secret"
    assert secret.stat().st_mode & 0o077 == 0
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    changed = [
        start(noise=0.2),
        start(codec="bf16"),
        start(model={"path": str(other)}),
        start(model={"bottom": 2}),
        start(model={"dtype": "bfloat16"}),
        start(boundary={"width": 6}),
        start(boundary={"width": 6}, seed=1),
    ]
    for one in changed:
        shutil.copy(secret, one.folder / "silo" / "released" / "secret")
        one.start_silo()
    same_but_secret = start()
    numbers = [one.boundary.released.number(*row) for one in (party, *changed, same_but_secret)]
    numbers += [party.boundary.released.number(text, 1) for text in ([4, 5], [5, 4, 6], [4, 5, 6, 0])]
    assert len(set(numbers)) == len(numbers)
    same = start()
    shutil.copy(secret, same.folder / "silo" / "released" / "secret")
    same.start_silo()
    assert same.boundary.released.number(*row) == again[0]


def test_a_bottom_that_trains_is_refused(start: Start) -> None:
    party = start()
    party.logits()
    party.silo.model.bottom.requires_grad_(True)
    party.forget()
    with pytest.raises(errors.ModelError, match="bottom trains") as caught:
        party.logits()
    assert "release_once" in caught.value.remedy
    assert not party.tap.sent


def test_without_a_folder_releases_last_as_long_as_the_silo(start: Start) -> None:
    party = start()
    silo = join(party.recipe, "a", channel=party.tap)
    folder = silo.boundary.released._folder
    with torch.no_grad():
        silo.model(**collate(ROWS, 0).inputs(), use_cache=False)
    assert len(list(folder.iterdir())) == len(ROWS) + 1
    del silo
    assert not folder.exists()
