"""Counts of a peer's requests, refusals and bytes."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.wire.traffic import Traffic


@given(st.lists(st.tuples(st.sampled_from(["forward", "ping"]), st.integers(0, 10**9))))
def test_requests_and_bytes_add_up(requests: list[tuple[str, int]]) -> None:
    traffic = Traffic("north")
    assert traffic.last is None
    for kind, size in requests:
        traffic.came(kind, size)
    assert traffic.requests.total() == len(requests)
    assert traffic.received_bytes == sum(size for _, size in requests)
    assert (traffic.last is None) == (not requests)


def test_a_peer_that_is_refused_again_and_again_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "isthmus")
    traffic = Traffic("north")
    for _ in range(1000):
        traffic.refuse("forward", "protocol")
    assert traffic.refusals == {"protocol": 1000}
    assert [record.__dict__["times"] for record in caplog.records] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert caplog.messages[0] == "forward of north was refused: protocol (number 1)"
