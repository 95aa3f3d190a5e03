"""Stretches: block after block, the sequences that pass it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.trunk.stretches import Stretch, stretches_of

BLOCKS = 7
Passed = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).filter(lambda pair: pair[0] < pair[1])


@given(st.lists(Passed.map(lambda pair: range(*pair)), min_size=1, max_size=6))
def test_each_sequence_passes_its_blocks_in_order_and_no_other(passed: list[range]) -> None:
    taken: list[list[int]] = [[] for _ in passed]
    for stretch in stretches_of(passed):
        for row in stretch.rows:
            taken[row] += stretch.blocks
    assert taken == [list(blocks) for blocks in passed]


@given(st.lists(Passed.map(lambda pair: range(*pair)), min_size=1, max_size=6))
def test_all_who_pass_a_block_pass_it_together(passed: list[range]) -> None:
    found = stretches_of(passed)
    for block in range(BLOCKS):
        own = [stretch.rows for stretch in found if block in stretch.blocks]
        expected = tuple(row for row, blocks in enumerate(passed) if block in blocks)
        assert own == ([expected] if expected else [])


def test_alike_sequences_are_one_stretch() -> None:
    assert stretches_of([range(1, 4)] * 3) == [Stretch(range(1, 4), (0, 1, 2))]
    assert stretches_of([range(4), range(1, 3)]) == [
        Stretch(range(1), (0,)),
        Stretch(range(1, 3), (0, 1)),
        Stretch(range(3, 4), (0,)),
    ]
