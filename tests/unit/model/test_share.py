"""Shares of a weight are all of it, once, in order, and as equal as they can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import NotSupportedError
from isthmus.model.share import RowShare


@given(ranks=st.integers(1, 9), total=st.integers(0, 70))
def test_shares_are_the_whole(ranks: int, total: int) -> None:
    weight = torch.arange(2 * total).view(total, 2)
    shares = [RowShare(rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([share.of(weight) for share in shares]), weight)
    sizes = [share.size(total) for share in shares]
    assert sizes == [len(share.of(weight)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_rows_are_refused_by_name() -> None:
    outputs = {"layers.1.self_attn.q_proj": 32, "layers.1.self_attn.k_proj": 3}
    RowShare(0, 3).check(outputs)
    with pytest.raises(
        NotSupportedError, match=r"4 ranks cannot share the 3 rows of layers.1.self_attn.k_proj"
    ) as caught:
        RowShare(0, 4).check(outputs)
    assert caught.value.remedy == "start 3 ranks at most"
    RowShare(0, 4).check({})
