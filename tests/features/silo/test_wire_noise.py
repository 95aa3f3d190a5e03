"""The noise in captured frames, by every mechanism and on every path: as large as stated, independent across tokens.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.privacy.analytic import gaussian_noise
from isthmus.privacy.events import Release
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import Split, outbound, save_tiny_model
from tests.features.silo.test_wiretap import GREEDY, Tapped, recipe_of, tapped, train
from tests.oracle.twins import prompts

WIDTH = 32
CLIP = 0.05
"""Below the norm of nearly every hidden state here."""
MECHANISMS: dict[str, dict[str, Any]] = {
    "gaussian": {"clip": CLIP, "noise": 0.3},
    "token": {"mechanism": "dp_gaussian", "clip": CLIP, "epsilon": 2.0, "delta": 1e-5},
    "sequence": {"mechanism": "dp_gaussian", "clip": CLIP, "epsilon": 2.0, "delta": 1e-5, "unit": "sequence"},
    "metric": {"mechanism": "metric", "clip": CLIP, "epsilon": 60.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture(params=MECHANISMS)
def silo(request: pytest.FixtureRequest, split: Split, folder: Path) -> Tapped:
    """With the secret noise of a real run."""
    how = MECHANISMS[request.param]
    found = tapped(split, recipe_of(folder, forward=how, gradient=how), seed=None)
    found.name = request.param  # type: ignore[attr-defined]
    return found


def clipped(name: str, h_TD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    pieces = h_TD.split(lengths if name == "sequence" else 1)
    return torch.cat([piece * min(1.0, CLIP / max(float(piece.norm()), 1e-30)) for piece in pieces])


def deviation(name: str) -> float:
    """Stated, on each coordinate."""
    how = MECHANISMS[name]
    if name == "metric":
        return (WIDTH + 1) ** 0.5 / float(how["epsilon"])
    return float(how.get("noise") or 2 * CLIP * gaussian_noise(2.0, 1e-5))


def assert_stated_noise(silo: Tapped, sent: list[torch.Tensor], clean: list[torch.Tensor], lengths: Any) -> None:
    name = silo.name  # type: ignore[attr-defined]
    assert len(sent) == len(clean) > 0
    told = zip(sent, clean, lengths, strict=True)
    drawn_TD = torch.cat([out - clipped(name, own, list(each)) for out, own, each in told])
    rows = len(drawn_TD)
    assert rows > 100
    assert float(drawn_TD.square().mean().sqrt()) == pytest.approx(deviation(name), rel=0.06)
    assert abs(float(drawn_TD.mean())) < 5 * deviation(name) / drawn_TD.numel() ** 0.5
    assert drawn_TD.square().mean(dim=0).sqrt().max() < 1.5 * deviation(name)
    unit_TD = drawn_TD / drawn_TD.norm(dim=1, keepdim=True)
    cosines = (unit_TD @ unit_TD.T)[torch.triu(torch.ones(rows, rows), diagonal=1).bool()]
    assert abs(float(cosines.mean())) < 5 / (cosines.numel() * WIDTH) ** 0.5
    assert float(cosines.square().mean()) == pytest.approx(1 / WIDTH, rel=0.1)
    lengths_T = drawn_TD.norm(dim=1)
    neighbours = torch.corrcoef(torch.stack([lengths_T[:-1], lengths_T[1:]]))[0, 1]
    assert abs(float(neighbours)) < 5 / rows**0.5


def paths_of(silo: Tapped, path: str) -> list[Release]:
    return [release for release in silo.ledger.releases if release.path == path]


def test_training(silo: Tapped) -> None:
    gradients = [gradient for _, gradient in train(silo)]
    lengths = [request.lengths for request in silo.tap.requests if isinstance(request, pb.Forward)]
    assert_stated_noise(silo, silo.released(pb.Forward), silo.clean, lengths)
    assert_stated_noise(silo, silo.released(pb.Backward), gradients, lengths)
    forward, gradient = paths_of(silo, "forward"), paths_of(silo, "gradient")
    assert len(forward) == len(gradient) == 3
    for release, each in zip([*forward, *gradient], [*lengths, *lengths], strict=True):
        assert (release.rows, release.width, release.clip) == (sum(each), WIDTH, CLIP)
        assert len(release.charges) == len(each)
        assert all(charge.bounded for charge in release.charges)


def test_generation(silo: Tapped) -> None:
    silo.model.generate(**prompts(), **GREEDY)
    requests = [request for request in silo.tap.requests if isinstance(request, pb.Decode)]
    assert_stated_noise(silo, silo.released(pb.Decode), silo.clean, [request.lengths for request in requests])
    assert len(paths_of(silo, "forward")) == len(requests)
    assert len({charge.record for release in silo.ledger.releases for charge in release.charges}) == 3


@torch.no_grad()
def test_a_lost_session_gets_the_same_draw_again(silo: Tapped) -> None:
    session = silo.model.trunk.open_session()
    for _ in range(2):
        session.step(outbound(session, torch.ones(3, WIDTH)))
    silo.tap.call(pb.Close(session=session.id))
    session.step(outbound(session, torch.ones(3, WIDTH)))
    first, second, third, *again = silo.released(pb.Decode)
    assert [torch.equal(one, other) for one, other in zip(again, (first, second, third), strict=True)] == [True] * 3
    assert not torch.equal(first, second)
    assert len(silo.ledger.releases) == 3
