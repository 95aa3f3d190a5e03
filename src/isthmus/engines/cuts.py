"""Which cut suits a silo: what was measured of each candidate, and the rule by which one of them is chosen."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isthmus.errors import CutError

CUTS = ((1, 1), (2, 2), (3, 3), (5, 5), (1, 5), (5, 1))
"""Cuts that are measured if none are named: blocks at the bottom and at the top."""
EQUALLY_FAST = 1.25
"""Steps of up to so many times the fastest one's duration count as equally fast: timings on a busy machine vary by a
tenth or two, and a choice must not hang on that."""
ROUND_TRIPS = 3
"""Times that a silo waits for the trunk in a training step: forward, backward, commit."""
UPDATE_TRIPS = 2
"""Times that a silo waits for the root in a round: plan, update."""
AVERAGING_SHARE = 0.1
"""Share of the steps' time that averaging may add before it is better done after more steps."""
CONNECTIONS = 5
"""Connections of which the fastest is the round trip."""
CONNECT_SECONDS = 2.0
"""Longest time to wait for a connection."""


@dataclass(frozen=True)
class CutFigures:
    """What was measured of one cut. None: not measured."""

    bottom: int
    top: int
    memory: int | None = None
    """Most bytes in memory at once of the silo's process in a training step, on a CUDA device of the device's memory;
    None: the process was ended for want of memory."""
    silo_step: float | None = None
    """Seconds of a training step in the silo."""
    trunk_step: float | None = None
    """Seconds of its forward and backward in the trunk."""
    up: int = 0
    """Bytes to the trunk in a training step."""
    down: int = 0
    """Bytes from the trunk in a training step."""
    silo_token: float | None = None
    """Seconds of a decoded token in the silo."""
    trunk_token: float | None = None
    """Seconds of a decoded token in the trunk."""
    token_bytes: int = 0
    """Bytes of a decoded token, both ways."""
    update_bytes: int = 0
    """Bytes of an update to the root and of the mean that comes back."""
    leakage: float | None = None
    """Share of the text's tokens that the best attack recovers, 0 to 1."""
    leakage_interval: tuple[float, float] | None = None
    """Its 95 % interval over rows."""
    attack: str | None = None
    """The best attack."""
    attacked_rows: int = 0
    known_rows: int = 0
    """Rows that the attacker knows, with what crossed of them."""


@dataclass(frozen=True)
class Link:
    """The way between silo and trunk."""

    rtt: float | None
    """Seconds of a round trip; None: not known."""
    bandwidth: float | None
    """Bytes a second; None: not known, and left out of the times."""
    source: str
    """Where the figures are from, in words."""

    def seconds(self, round_trips: int, size: int) -> float:
        """Time on the way of so many round trips that carry so many bytes together."""
        return round_trips * (self.rtt or 0.0) + (size / self.bandwidth if self.bandwidth else 0.0)


@dataclass(frozen=True)
class CutLimits:
    """What a cut must keep to."""

    memory: float
    """Most bytes of the silo's process."""
    leakage: float | None
    """Largest share of tokens that may be recovered; None: any."""


@dataclass(frozen=True)
class Averaging:
    """What averaging behind the chosen cut costs on a link to the root like that to the trunk."""

    seconds: float
    """Of an update and the mean that comes back."""
    share: float
    """Of the time of the steps between two averages, with the steps that were asked about."""
    interval: int
    """Fewest steps a round with which it is at most ``AVERAGING_SHARE``."""


@dataclass(frozen=True)
class CutChoice:
    """The table of cuts and the one chosen from it."""

    silo: str
    figures: tuple[CutFigures, ...]
    link: Link
    limits: CutLimits
    bottom: int
    top: int
    why: str
    averaging: Averaging | None = None
    """What averaging costs behind the chosen cut; None: not asked."""

    @property
    def chosen(self) -> CutFigures:
        """The figures of the chosen cut."""
        return next(one for one in self.figures if (one.bottom, one.top) == (self.bottom, self.top))


def candidate_cuts(named: Sequence[str], blocks: int) -> list[tuple[int, int]]:
    """The cuts to measure: those that are named as ``A,C``, or of ``CUTS`` those that fit the model.

    Args:
        named: texts with one cut each or several with blanks between them.
        blocks: the model's number of blocks.

    Raises:
        CutError: a text is no cut, one leaves bottom, trunk or top without a block, or none fits.
    """
    cuts = [parse_cut(one, "--cuts") for text in named for one in text.split()]
    for bottom, top in cuts:
        if bottom < 1 or top < 1 or bottom + top >= blocks:
            raise CutError(
                f"the cut ({bottom}, {top}) does not fit a model of {blocks} blocks",
                remedy=f"choose at least 1 block at the bottom and 1 at the top, together at most {blocks - 1}",
            )
    found = list(dict.fromkeys(cuts or [cut for cut in CUTS if sum(cut) < blocks]))
    if not found:
        raise CutError(f"a model of {blocks} blocks cannot be cut in three", remedy="use a model of 3 blocks or more")
    return found


def parse_cut(text: str, flag: str = "--cut") -> tuple[int, int]:
    """The cut ``A,C``: blocks at the bottom and at the top.

    Args:
        flag: the option that the text is of.

    Raises:
        CutError: it is not two numbers.
    """
    bottom, comma, top = text.partition(",")
    if not (comma and bottom.strip().isdecimal() and top.strip().isdecimal()):
        raise CutError(f"the cut {text!r} is not two numbers", remedy=f"give blocks at bottom and top, as {flag} 2,3")
    return int(bottom), int(top)


def measured_link(address: str, rtt: float | None = None, bandwidth: float | None = None) -> Link:
    """The link to the trunk.

    Args:
        address: the trunk's ``host:port``. Its round trip is the fastest of some TCP connections, which need no
            certificate and send nothing.
        rtt: seconds of a round trip, in place of a measurement.
        bandwidth: bytes a second. Only a trunk that takes part could measure it.
    """
    if rtt is not None:
        return Link(rtt, bandwidth, "as given")
    try:
        return Link(min(_connecting(address) for _ in range(CONNECTIONS)), bandwidth, f"to the trunk at {address}")
    except OSError:
        away = f"none: the trunk at {address} cannot be reached, and no --rtt is given"
        return Link(None, bandwidth, away)


def _connecting(address: str) -> float:
    host, _, port = address.rpartition(":")
    started = time.perf_counter()
    with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
        return time.perf_counter() - started


def step_seconds(figures: CutFigures, link: Link) -> float:
    """Seconds of a training step; without the trunk's part if that was not measured."""
    own = math.inf if figures.silo_step is None else figures.silo_step
    return own + (figures.trunk_step or 0.0) + link.seconds(ROUND_TRIPS, figures.up + figures.down)


def token_seconds(figures: CutFigures, link: Link) -> float:
    """Seconds of a decoded token; without the trunk's part if that was not measured."""
    own = math.inf if figures.silo_token is None else figures.silo_token
    return own + (figures.trunk_token or 0.0) + link.seconds(1, figures.token_bytes)


def averaging(figures: CutFigures, link: Link, steps: int) -> Averaging:
    """What averaging after so many steps costs beside the steps, and how seldom it should be done on a slow link."""
    seconds, step = link.seconds(UPDATE_TRIPS, figures.update_bytes), step_seconds(figures, link)
    interval = max(1, math.ceil(seconds / (AVERAGING_SHARE * step)))
    return Averaging(seconds, seconds / (steps * step), interval)


def choose_cut(silo: str, figures: Sequence[CutFigures], link: Link, limits: CutLimits) -> CutChoice:
    """Of the cuts that fit the silo's memory and the limit of leakage the fastest.

    Those within ``EQUALLY_FAST`` of the fastest step are equally fast: of them the one with the least memory (two
    digits of it count), of these the one with the fewest blocks in the silo, of these the one with more at the bottom.

    Raises:
        CutError: no cut fits, or the limit is on a leakage that was not measured.
    """
    if limits.leakage is not None and all(one.leakage is None for one in figures):
        raise CutError(
            f"leakage is limited to {limits.leakage:.0%}, but no attack was made",
            remedy="leave out --rows 0, give the silo more rows, or leave out the limit (--leakage, model.leakage)",
        )
    fitting = [one for one in figures if _fits(one, limits)]
    if not fitting:
        raise CutError(f"no cut fits: {_nearest(figures, limits)}", remedy=_remedy(figures, limits))
    fastest = min(step_seconds(one, link) for one in fitting)
    fast = [one for one in fitting if step_seconds(one, link) <= EQUALLY_FAST * fastest]
    best = min(fast, key=lambda one: (_two_digits(one.memory or 0), one.bottom + one.top, -one.bottom))
    why = f"{len(fitting)} of {len(figures)} cuts fit; {_reason(fast)}"
    return CutChoice(silo, tuple(figures), link, limits, best.bottom, best.top, why)


def _reason(fast: Sequence[CutFigures]) -> str:
    if len(fast) == 1:
        return "its step is the fastest"
    return f"{len(fast)} are equally fast (within a quarter), and of these it takes the least memory"


def _fits(one: CutFigures, limits: CutLimits) -> bool:
    if one.memory is None or one.memory > limits.memory or one.silo_step is None:
        return False
    return limits.leakage is None or (one.leakage is not None and one.leakage <= limits.leakage)


def _nearest(figures: Iterable[CutFigures], limits: CutLimits) -> str:
    """What the most modest of the cuts would need."""
    sizes = [(one.memory, one) for one in figures if one.memory is not None]
    leaks = [(one.leakage, one) for one in figures if one.leakage is not None]
    words = []
    if not sizes:
        words.append("the silo's process was ended for want of memory at each")
    elif (least := min(sizes, key=lambda pair: pair[0]))[0] > limits.memory:
        words.append(f"memory: {least[0] / 1e6:,.0f} MB at {_name(least[1])}, allowed are {limits.memory / 1e6:,.0f}")
    if limits.leakage is not None and leaks:
        low = min(leaks, key=lambda pair: pair[0])
        words.append(f"leakage: {low[0]:.1%} at {_name(low[1])} at least, allowed is {limits.leakage:.0%}")
    return "; ".join(words)


def _remedy(figures: Iterable[CutFigures], limits: CutLimits) -> str:
    small = any(one.memory is not None and one.memory <= limits.memory for one in figures)
    if not small:
        return "use a machine with more memory (--memory), a smaller train.batch or train.max_tokens, or fewer blocks"
    return (
        "allow more leakage (--leakage, model.leakage), or make less cross: boundary.tail, boundary.width, more noise "
        "(a deeper cut alone hides little)"
    )


def _name(one: CutFigures) -> str:
    return f"({one.bottom}, {one.top})"


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
