"""Mechanisms and their record: clip, then noise; immutable releases; one ledger line each."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DiskFullError
from isthmus.privacy.events import Release
from isthmus.privacy.ledger import FileLedger, MemoryLedger
from isthmus.privacy.mechanisms import Gaussian, secret_generator
from isthmus.recipe import ReleaseSection

RELEASE = Release("forward", step=3, rows=7, width=32, clip=1.5, noise=0.25, size=896)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(rows: int = 2000, width: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=generator(seed))


def test_zero_and_zero_is_the_identity() -> None:
    h_TD = random_rows()
    drawn = generator()
    assert torch.equal(Gaussian(0.0, 0.0).apply(h_TD, drawn), h_TD)
    assert torch.equal(drawn.get_state(), generator().get_state())


def test_of_takes_the_recipes_section() -> None:
    assert Gaussian.of(ReleaseSection(clip=2.0, noise=0.5)) == Gaussian(2.0, 0.5)


@settings(derandomize=True, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_clip_alone_scales_long_rows_and_leaves_short_ones(clip: float, scale: float, seed: int) -> None:
    h_TD = torch.cat([scale * random_rows(4, 8, seed), torch.zeros(1, 8)])
    clipped = Gaussian(clip, 0.0).apply(h_TD, generator())
    norms = h_TD.norm(dim=1)
    expected = torch.stack([row * (clip / norm) if norm > clip else row for row, norm in zip(h_TD, norms, strict=True)])
    assert torch.allclose(clipped, expected, rtol=1e-5, atol=0)
    assert torch.all(clipped.norm(dim=1) <= clip * (1 + 1e-6))


def test_noise_has_its_deviation_on_every_coordinate_and_no_correlation() -> None:
    drawn = Gaussian(0.0, 0.3).apply(torch.full((40_000, 8), 5.0), generator()) - 5.0
    assert torch.allclose(drawn.std(dim=0), torch.tensor(0.3), rtol=0.02)
    assert drawn.mean(dim=0).abs().max() < 4 * 0.3 / 200
    correlation = torch.corrcoef(drawn.T)
    assert (correlation - torch.eye(8)).abs().max() < 4.5 / 200
    lagged = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert abs(lagged) < 4 / drawn.numel() ** 0.5
    kurtosis = ((drawn / drawn.std()) ** 4).mean()
    assert kurtosis == pytest.approx(3.0, abs=0.1)


def test_noise_comes_after_the_clip() -> None:
    h_TD = 100 * random_rows()
    both = Gaussian(1.0, 0.5).apply(h_TD, generator())
    assert torch.equal(both, Gaussian(0.0, 0.5).apply(Gaussian(1.0, 0.0).apply(h_TD, generator()), generator()))
    assert both.norm(dim=1).mean() > 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_is_float32_and_detached(dtype: torch.dtype) -> None:
    h_TD = random_rows(3).to(dtype).requires_grad_(True)
    for mechanism in (Gaussian(0.0, 0.0), Gaussian(1.0, 0.0), Gaussian(1.0, 0.1)):
        secured = mechanism.apply(h_TD, generator())
        assert secured.dtype is torch.float32
        assert not secured.requires_grad
    assert h_TD.dtype is dtype


def test_the_input_is_never_changed() -> None:
    h_TD = random_rows()
    before = h_TD.clone()
    Gaussian(0.5, 0.5).apply(h_TD, generator())
    assert torch.equal(h_TD, before)


def test_secret_generators_are_each_their_own() -> None:
    torch.manual_seed(0)
    first = secret_generator()
    torch.manual_seed(0)
    assert first.initial_seed() != secret_generator().initial_seed() != torch.initial_seed()


def test_a_release_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        RELEASE.noise = 9.0  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        RELEASE.extra = 1  # type: ignore[attr-defined]
    assert len({RELEASE, Release(**RELEASE.to_dict())}) == 1


def test_ledgers_keep_releases_in_order(tmp_path: Path) -> None:
    memory, file = MemoryLedger(), FileLedger(tmp_path / "new" / "ledger.jsonl")
    releases = [RELEASE, Release("update", 1, 1, 64, 0.0, 0.0, 256)]
    for release in releases:
        memory.record(release)
        file.record(release)
    lines = [json.loads(line) for line in (tmp_path / "new" / "ledger.jsonl").read_text().splitlines()]
    assert memory.releases == releases
    assert all(isinstance(line.pop("time"), float) for line in lines)
    assert lines == [release.to_dict() for release in releases]


def test_a_reopened_ledger_goes_on_where_it_was(tmp_path: Path) -> None:
    for _ in range(2):
        FileLedger(tmp_path / "ledger.jsonl").record(RELEASE)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 2


def test_a_line_is_on_the_file_when_record_returns(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path / "ledger.jsonl")
    ledger.record(RELEASE)
    assert (tmp_path / "ledger.jsonl").read_bytes().endswith(b"}\n")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"ledger\.jsonl"):
        FileLedger(tmp_path / "ledger.jsonl").record(RELEASE)
