"""The stash: what autograd saves is counted as it is freed, and the silo that holds most loses its oldest graphs."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch

from isthmus.trunk.stash import Pass, SavedBytes, bound_stash


def made(number: int, nbytes: int, **rows: int) -> Pass:
    return Pass([], [], (torch.zeros(1),), number, nbytes, Counter(rows))


def test_each_storage_is_counted_once_and_known_ones_never() -> None:
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    saved = SavedBytes([weight, x])
    with saved:
        y = (x @ weight).exp()
        z = y * y  # saves y, which exp has saved
    assert saved.nbytes == y.nbytes
    z.sum().backward()
    expected = torch.ones(4, 8) * 2 * torch.exp(torch.tensor(8.0)) ** 2 * 8
    torch.testing.assert_close(x.grad, expected)


def test_a_counted_graph_is_freed_with_its_output() -> None:
    x = torch.ones(4, requires_grad=True)
    gc.disable()
    with SavedBytes([]):
        y = x.exp().exp()
    gone = weakref.ref(y)
    del y
    gc.enable()
    assert gone() is None


def test_the_oldest_of_the_silo_that_holds_most_go_first_and_shared_ones_last() -> None:
    shared, own = made(0, 10, a=1, b=9), [made(number, 10, b=1) for number in (1, 2, 3)]
    other = made(4, 10, a=1)
    bound_stash([shared, *own, other], 30)
    assert [one.outputs is None for one in (shared, *own, other)] == [False, True, True, False, False]
    bound_stash([shared, *own, other], 15)
    assert [one.nbytes for one in (shared, *own, other)] == [10, 0, 0, 0, 0]


@pytest.mark.parametrize("limit", [-1, 0, 9])  # below 0 where the inputs alone are more than may be
def test_one_that_is_too_large_by_itself_is_dropped(limit: int) -> None:
    one = made(0, 10, a=1)
    bound_stash([one], limit)
    assert one.outputs is None
    assert one.nbytes == 0
