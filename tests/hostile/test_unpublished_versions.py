"""Where silos wait for nobody: one that begins a version which the root has not published ends nobody's rounds, and
the trunk saves nothing as that version's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import IdentityError, IsthmusError, ProtocolError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.authority import Authority
from isthmus.wire.published import sign_version
from tests.conftest import save_tiny_model
from tests.hostile.served import WAIT, Served

SILOS = ("good", "third", "bad")
ROUNDS = 4
Start = Callable[..., Served]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), blocks=4)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    opened: list[Served] = []

    def served(together: bool = False) -> Served:
        opened.append(
            Served(
                model,
                tmp_path / f"federation{len(opened)}",
                together=together,
                silos=SILOS,
                federation={"asynchronous": {"buffer": 1}},
                train={"rounds": ROUNDS, "steps": 1, "evaluate": False},
            )
        )
        return opened[-1]

    yield served
    for one in opened:
        one.__exit__()


class Party:
    """A silo's two channels."""

    def __init__(self, served: Served, name: str) -> None:
        self.name = name
        self.trunk, self.root = served.channel("trunk", name), served.channel("root", name)

    def plan(self) -> pb.Plan:
        plan = self.root.submit(pb.Ready(run=self.trunk.welcome.run)).result(WAIT)
        assert isinstance(plan, pb.Plan)
        return plan

    def begin(self, version: int, shown: pb.Published | None = None) -> Any:
        request = pb.Begin(round=version + 1, participants=[self.name], published=shown)
        return self.trunk.submit(request).result(WAIT)

    def train(self) -> pb.Plan:
        """One whole round without a change of its own. Returns the next plan."""
        plan = self.plan()
        self.begin(plan.completed, plan.published)
        self.trunk.submit(pb.Commit(round=plan.round, step=1)).result(WAIT)
        self.root.submit(pb.Update(round=plan.round)).result(WAIT)
        return self.plan()


@pytest.mark.parametrize("together", [False, True], ids=["two servers", "one server"])
@pytest.mark.parametrize("version", [1, 2, ROUNDS, ROUNDS + 1, 2**31])
def test_a_version_that_is_not_there_is_refused_and_all_go_on(version: int, together: bool, start: Start) -> None:
    served = start(together)
    good, bad = Party(served, "good"), Party(served, "bad")
    own = bad.plan().published
    first = good.plan()
    good.begin(first.completed, first.published)
    for shown in (None, own, pb.Published(certificate=own.certificate), pb.Published(signature=own.signature)):
        with pytest.raises((ProtocolError, IdentityError)) as caught:
            bad.begin(version, shown)
        assert caught.value.remedy
    assert served.run.role("trunk").last_round() == 0  # nothing was saved as that version's
    good.trunk.submit(pb.Commit(round=1, step=1)).result(WAIT)  # and its round is not over
    good.root.submit(pb.Update(round=1)).result(WAIT)
    for number in range(1, ROUNDS):
        assert good.train().completed == number + 1
        assert served.run.role("trunk").last_round() == number
    last = good.plan()
    assert not last.round
    bad.begin(last.completed, last.published)  # who has not trained at all may say that it is over, once it is
    with pytest.raises(IsthmusError, match="not in round"):
        good.trunk.submit(pb.Commit(round=ROUNDS, step=1)).result(WAIT)


def forged(served: Served, run: str, version: int) -> dict[str, pb.Published]:
    """What a silo that has a certificate of its own, or one of another federation, can make by itself."""
    root = sign_version(served.own["root"], run, 0)
    silo = served.own["bad"]
    signature = sign_version(silo, run, version).signature
    return {
        "its own": sign_version(silo, run, version),
        "its own, as the root's": pb.Published(certificate=root.certificate, signature=signature),
        "its own, as the trunk's": pb.Published(certificate=served.own["trunk"].certificate, signature=signature),
        "another authority's root": sign_version(Authority().issue("root"), run, version),
        "a silo named root": sign_version(served.issue("root", "silo"), run, version),
        "a root's of another name": sign_version(served.issue("bad", "root"), run, version),
        "an edge's": sign_version(served.issue("root", "edge"), run, version),
        "another run's": sign_version(served.own["root"], "another", version),
        "another version's": sign_version(served.own["root"], run, version - 1),
        "no certificate": pb.Published(certificate=b"\xff", signature=signature),
        "too long": pb.Published(certificate=bytes(1 << 20), signature=signature),
    }


def test_no_signature_but_the_roots_of_this_very_version_counts(start: Start) -> None:
    served = start()
    good, bad = Party(served, "good"), Party(served, "bad")
    run = bad.trunk.welcome.run
    for how, shown in forged(served, run, ROUNDS).items():
        with pytest.raises(IsthmusError) as caught:
            bad.begin(ROUNDS, shown)
        assert caught.value.remedy, how
    assert good.train().completed == 1
    assert served.run.role("trunk").rounds() == {0}


def test_a_version_may_be_begun_by_each_silo_and_again(start: Start) -> None:
    """One's signature is good for another: it is about the version alone."""
    served = start()
    good, bad = Party(served, "good"), Party(served, "bad")
    plan = good.train()
    bad.begin(plan.completed, plan.published)
    bad.begin(plan.completed, plan.published)
    assert served.run.role("trunk").rounds() == {0, 1}
    assert good.train().completed == 2


def test_one_silos_word_for_the_run_shuts_out_nobody(start: Start) -> None:
    """Versions are signed for a run. The root keeps the name that most silos gave, whoever spoke last before the first
    version was made: else its word would make strangers of all others."""
    served = start()
    good, third, bad = (Party(served, name) for name in SILOS)
    for one in (good, third):
        one.plan()
    for name in ("another", "and another"):
        bad.root.submit(pb.Ready(run=name)).result(WAIT)
    assert good.train().completed == 1
    with pytest.raises(ProtocolError, match="another run"):
        bad.root.submit(pb.Ready(run="another")).result(WAIT)
    assert third.train().completed == 2
