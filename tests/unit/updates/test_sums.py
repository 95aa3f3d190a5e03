"""The format of a sum: what a silo encodes decodes again, and sums are read as weighted means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.updates.flat import Layout
from isthmus.updates.projections import random_k
from isthmus.updates.quantize import Ring
from isthmus.updates.sums import SumFormat

SIZE, KEPT, SILOS = 40, 10, 3
LAYOUT = Layout({"b": (4, 5), "a": (20,)})
WHOLE = SumFormat(LAYOUT, Ring(SILOS, 4.0))
FEWER = SumFormat(LAYOUT, Ring(SILOS, 4.0), random_k(SIZE, KEPT, 7, 1, unbiased=False))


def row(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


@pytest.mark.parametrize(("sums", "count"), [(WHOLE, SIZE), (FEWER, KEPT)], ids=["whole", "fewer"])
def test_sizes_are_those_of_what_a_silo_sends(sums: SumFormat, count: int) -> None:
    assert sums.count == count
    assert sums.size == count + sums.ring.digits == len(sums.encode(row(0), 1.0))
    assert SumFormat(LAYOUT, sums.ring, sums.projection, indicators=1).size == sums.size + 1


@pytest.mark.parametrize("sums", [WHOLE, FEWER], ids=["whole", "fewer"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_silos_own_numbers_decode_to_its_row(sums: SumFormat, share: float) -> None:
    expected = sums.lift(sums.project(row(0)))
    decoded = sums.decode(sums.encode(row(0), share), share)
    assert decoded.dtype == torch.float32
    assert (decoded - expected).abs().max() <= sums.ring.step / share * 1.01


@pytest.mark.parametrize("sums", [WHOLE, FEWER], ids=["whole", "fewer"])
def test_a_sum_is_read_as_the_mean_weighted_by_shares(sums: SumFormat) -> None:
    shares = [1.0, 0.5, 0.25]
    total_KS = sum(sums.encode(row(seed), share).astype(np.int64) for seed, share in enumerate(shares))
    assert not isinstance(total_KS, int)
    mean = sums.mean(total_KS)
    assert mean is not None
    weight, tensors = mean
    assert weight == pytest.approx(sum(shares), abs=1e-3)
    expected_P = sum(share * row(seed) for seed, share in enumerate(shares)) / sum(shares)
    expected = LAYOUT.tensors(sums.lift(sums.project(torch.as_tensor(expected_P))))
    assert tensors.keys() == {"a", "b"}
    for name, tensor in tensors.items():
        assert (tensor - expected[name]).abs().max() <= 3 * sums.ring.step / sum(shares) + 1e-3


@pytest.mark.parametrize("within", range(SILOS + 1))
def test_indicators_give_the_part_of_the_silos_within_the_clip(within: int) -> None:
    sums = SumFormat(LAYOUT, Ring(SILOS, 4.0), indicators=1)
    says = sum(sums.ring.side(silo < within).astype(np.int64) for silo in range(SILOS))
    total = np.concatenate([np.zeros(SIZE, np.int64), says, SILOS * sums.ring.encode_share(1.0).astype(np.int64)])
    assert sums.within(total) == pytest.approx(within / SILOS)
