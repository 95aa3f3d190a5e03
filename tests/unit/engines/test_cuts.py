"""The rule that chooses a cut from measured ones, the cuts that are measured, and the link to the trunk."""

from __future__ import annotations

import itertools
import socket
from dataclasses import replace

import pytest

from isthmus.engines.cuts import (
    CUTS,
    EQUALLY_FAST,
    CutFigures,
    CutLimits,
    Link,
    averaging,
    candidate_cuts,
    choose_cut,
    measured_link,
    parse_cut,
    step_seconds,
    token_seconds,
)
from isthmus.errors import CutError

NEAR = Link(0.0, None, "near")
ANY = CutLimits(10**9, None)


def figures(bottom: int, top: int, memory: int = 100, step: float = 1.0, leakage: float | None = 0.9) -> CutFigures:
    return CutFigures(
        bottom, top, memory, step, 0.5, 1000, 2000, 0.01, 0.02, 300, 500, leakage, (0.8, 1.0), "linear", 4, 8
    )


def chosen(*measured: CutFigures, limits: CutLimits = ANY, link: Link = NEAR) -> tuple[int, int]:
    choice = choose_cut("north", measured, link, limits)
    return choice.bottom, choice.top


def test_named_cuts_and_those_that_fit_the_model() -> None:
    assert candidate_cuts(["1,2 3,4", "1,2"], 8) == [(1, 2), (3, 4)]
    assert candidate_cuts([], 30) == list(CUTS)
    assert candidate_cuts([], 5) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("text", ["3", "a,b", "1,", "1,2,3", "-1,2", "1;2", "1.5,2", "²,1"])
def test_what_is_no_cut_is_refused(text: str) -> None:
    with pytest.raises(CutError, match="is not two numbers") as refused:
        candidate_cuts([text], 8)
    assert "--cuts 2,3" in refused.value.remedy
    with pytest.raises(CutError, match="is not two numbers") as refused:
        parse_cut(text)
    assert "--cut 2,3" in refused.value.remedy


def test_blanks_beside_the_comma_are_no_harm() -> None:
    assert parse_cut("2, 3") == (2, 3)


@pytest.mark.parametrize("text", ["4,4", "0,2", "2,0", "8,1", "1,99999999999999999999"])
def test_a_cut_that_leaves_a_part_without_a_block_is_refused(text: str) -> None:
    with pytest.raises(CutError, match="does not fit a model of 8 blocks") as refused:
        candidate_cuts([text], 8)
    assert "at most 7" in refused.value.remedy


def test_a_model_of_two_blocks_has_no_cut() -> None:
    with pytest.raises(CutError, match="cannot be cut in three"):
        candidate_cuts([], 2)


def test_times_are_those_of_silo_trunk_and_link() -> None:
    link = Link(0.1, 1000.0, "far")
    assert step_seconds(figures(1, 1), link) == pytest.approx(1.0 + 0.5 + 3 * 0.1 + 3.0)
    assert token_seconds(figures(1, 1), link) == pytest.approx(0.01 + 0.02 + 0.1 + 0.3)
    assert step_seconds(replace(figures(1, 1), trunk_step=None), NEAR) == 1.0


def test_the_fastest_that_fits_is_chosen() -> None:
    assert chosen(figures(1, 1, step=3.0), figures(2, 2, step=1.0), figures(3, 3, step=2.0)) == (2, 2)
    limits = CutLimits(150, 0.5)
    measured = (figures(1, 1, leakage=0.9), figures(2, 2, memory=200, leakage=0.1), figures(3, 3, step=9, leakage=0.5))
    assert chosen(*measured, limits=limits) == (3, 3)


def test_timing_noise_does_not_change_the_choice() -> None:
    """Whatever the timings within a tenth of their mean, and whatever the order of the cuts."""
    for order in itertools.permutations([figures(1, 1, 100), figures(2, 2, 120), figures(5, 1, 160)]):
        for noise in itertools.product((0.9, 1.0, 1.1), repeat=3):
            noised = [
                replace(one, silo_step=factor * 1.0, trunk_step=factor * 0.5)
                for one, factor in zip(order, noise, strict=True)
            ]
            assert chosen(*noised) == (1, 1)


def test_equally_fast_cuts_of_equal_memory_are_told_apart_by_their_blocks() -> None:
    assert chosen(figures(5, 1, 1001), figures(1, 5, 1000), figures(3, 3, 1002)) == (5, 1)
    assert chosen(figures(2, 2, 1004), figures(1, 1, 1049)) == (1, 1)


def test_a_cut_that_is_slower_by_more_than_the_tolerance_is_not_chosen_for_its_memory() -> None:
    slow = replace(figures(1, 1, 10), trunk_step=0.0, silo_step=EQUALLY_FAST * 1.5 + 0.01)
    assert chosen(slow, figures(2, 2, 900)) == (2, 2)


def test_a_cut_whose_process_was_killed_does_not_fit() -> None:
    assert chosen(CutFigures(5, 5), figures(1, 1, step=99)) == (1, 1)
    with pytest.raises(CutError, match="ended for want of memory") as refused:
        chosen(CutFigures(5, 5))
    assert "--memory" in refused.value.remedy


def test_no_cut_in_so_little_memory() -> None:
    with pytest.raises(CutError, match=r"memory: 2 MB at \(1, 1\), allowed are 1") as refused:
        chosen(figures(1, 1, 2_000_000), figures(2, 2, 3_000_000), limits=CutLimits(1_000_000, None))
    assert "--memory" in refused.value.remedy


def test_no_cut_leaks_so_little() -> None:
    with pytest.raises(CutError, match=r"leakage: 80.0% at \(2, 2\) at least, allowed is 50%") as refused:
        chosen(figures(1, 1), figures(2, 2, leakage=0.8), limits=CutLimits(10**9, 0.5))
    assert "boundary.tail" in refused.value.remedy


def test_a_limit_of_leakage_without_an_attack_is_refused() -> None:
    with pytest.raises(CutError, match="no attack was made"):
        chosen(figures(1, 1, leakage=None), limits=CutLimits(10**9, 0.5))
    assert chosen(figures(1, 1, leakage=None)) == (1, 1)


def test_the_link_to_a_trunk_that_listens() -> None:
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        link = measured_link(address, bandwidth=1e6)
    assert link.rtt is not None
    assert 0 < link.rtt < 2
    assert (link.bandwidth, link.source) == (1e6, f"to the trunk at {address}")


def test_a_trunk_that_cannot_be_reached_is_said_and_leaves_the_link_out() -> None:
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    link = measured_link(address)
    assert link.rtt is None
    assert "cannot be reached" in link.source
    assert link.seconds(3, 10**9) == 0.0
    assert measured_link(address, rtt=0.25) == Link(0.25, None, "as given")
    assert measured_link("no-such-host.invalid:1").rtt is None


def test_averaging_is_advised_more_seldom_on_a_slow_link() -> None:
    one = replace(figures(1, 1), silo_step=0.25, trunk_step=0.25, up=0, down=0, update_bytes=1_000_000)
    near, slow = averaging(one, NEAR, 1), averaging(one, Link(0.0, 1e6, "slow"), 2)
    assert (near.seconds, near.share, near.interval) == (0.0, 0.0, 1)
    assert (slow.seconds, slow.share, slow.interval) == (1.0, 1.0, 20)
    again = averaging(one, Link(0.0, 1e6, "slow"), slow.interval)
    assert again.share <= 0.1 < averaging(one, Link(0.0, 1e6, "slow"), slow.interval - 1).share


def test_the_way_to_the_root_counts_its_round_trips() -> None:
    one = replace(figures(1, 1), silo_step=1.0, trunk_step=0.0, up=0, down=0, update_bytes=0)
    assert averaging(one, Link(0.1, None, "far"), 1).seconds == pytest.approx(0.2)
