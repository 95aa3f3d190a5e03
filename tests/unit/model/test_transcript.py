"""The tape against one tensor that is cut the obvious way."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.model.transcript import Transcript

WIDTH = 3


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8), st.data())
def test_pieces_cropped_anywhere(pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    transcript, expected = Transcript(), torch.zeros(2, 0, WIDTH)
    for number, (length, dropped) in enumerate(pieces):
        piece = torch.full((2, length, WIDTH), float(number)) + torch.arange(length).view(1, -1, 1) / 10
        transcript.add(piece, -piece, torch.ones(2, length, dtype=torch.bool))
        expected = torch.cat([expected, piece], dim=1)
        dropped = min(dropped, expected.shape[1] - 1)
        transcript.crop(dropped)
        expected = expected[:, : expected.shape[1] - dropped]
        assert len(transcript) == expected.shape[1]
    start = data.draw(st.integers(0, len(transcript) - 1))
    piece = transcript.slice(start)
    assert torch.equal(piece.h_BLD, expected[:, start:])
    assert torch.equal(piece.g_BLD, -expected[:, start:])
    assert piece.real_BL.shape == piece.h_BLD.shape[:2]


def test_rows_are_kept_in_the_order_asked_for() -> None:
    transcript = Transcript()
    piece = torch.arange(3.0).view(3, 1, 1).expand(3, 2, WIDTH)
    transcript.add(piece, piece, torch.ones(3, 2, dtype=torch.bool))
    transcript.select([2, 0, 0])
    assert transcript.slice().h_BLD[:, 0, 0].tolist() == [2.0, 0.0, 0.0]
