"""What follows from a view: the parts that its adversary can run, and what the boundary does, read off its own rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus.attacks.knowledge import BoundaryMap, Knowledge, aligned
from isthmus.errors import AttackError, ModelError
from tests.unit.attacks.attacked import Attacked


def test_bottom_runs_as_the_silos_does(attacked: Attacked) -> None:
    view, truth = attacked()
    got = Knowledge(view).bottom_of(tuple(truth[0]))
    torch.testing.assert_close(got, view.crossings[0].hidden_LD, rtol=1e-4, atol=1e-5)


def test_own_rows_stand_beside_their_tokens(attacked: Attacked) -> None:
    view, _ = attacked(own=5)
    z_TD, tokens_T = aligned(view.pairs)
    assert len(z_TD) == len(tokens_T) == sum(pair.crossing.length for pair in view.pairs)
    assert tokens_T[: view.pairs[0].crossing.length].tolist() == list(view.pairs[0].tokens)


def test_the_boundarys_noise_is_estimated(attacked: Attacked) -> None:
    view, _ = attacked(noise=0.1, own=100)
    assert Knowledge(view).boundary_map.mean == pytest.approx(0.01, rel=0.2)


def test_a_map_clips_after_its_affine_part() -> None:
    h_TE = torch.tensor([[3.0, 4.0]])
    plain = BoundaryMap(1.0, None, None)
    torch.testing.assert_close(plain(h_TE), h_TE / 5)
    doubled = BoundaryMap(0.0, 2 * torch.eye(2), torch.ones(2))
    torch.testing.assert_close(doubled(h_TE), 2 * h_TE + 1)


def test_what_the_view_lacks_cannot_be_known(attacked: Attacked, tmp_path: Path) -> None:
    view, _ = attacked(own=5)
    with pytest.raises(AttackError):
        _ = Knowledge(replace(view, pairs=())).linear
    with pytest.raises(ModelError):
        _ = Knowledge(replace(view, folder=tmp_path)).bottom
