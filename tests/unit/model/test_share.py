"""Shares of a part's blocks are all of them, once, in order, and as equal as they can be."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import NotSupportedError
from isthmus.model.share import BlockShare


@given(ranks=st.integers(1, 9), more=st.integers(0, 70))
def test_shares_are_the_whole(ranks: int, more: int) -> None:
    total = ranks + more
    shares = [BlockShare(rank, ranks).blocks(total) for rank in range(ranks)]
    assert list(chain(*shares)) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_blocks_are_refused_by_name() -> None:
    assert [*BlockShare(2, 3).blocks(3)] == [2]
    with pytest.raises(NotSupportedError, match="4 ranks cannot share the 3 blocks of the trunk") as caught:
        BlockShare(0, 4).blocks(3)
    assert caught.value.remedy == "start 3 ranks at most"
