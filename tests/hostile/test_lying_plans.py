"""A root that lies in its plans: a silo sums with silos of its own cohort, and with those that were told the same.

The root puts in keys of its own as a participant's, asks for sums of too few, or gives one silo other adapters
(model inconsistency: Pasquini, Francati and Ateniese 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from isthmus.errors import DataError, IdentityError, ProtocolError
from isthmus.storage.record import RoleDirectory
from isthmus.updates.flat import Layout
from isthmus.updates.masking import Member
from isthmus.updates.quantize import Ring
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Identity
from isthmus.wire.sum_keys import plan_digest, sign_keys
from tests.features.federation.test_masked_rounds import AUTHORITY, IDENTITIES, NAMES, WAIT, Federation


@pytest.fixture
def federation(tmp_path: Any) -> Federation:
    return Federation(RoleDirectory(tmp_path))


def offered(identity: Identity) -> pb.SumKeys:
    advert = Member(identity.name).advert
    return sign_keys(identity, sealing=advert.sealing, masking=advert.masking, commitment=advert.promise)


def begin(federation: Federation, plan: pb.Plan) -> None:
    federation.silos["a"].updates.begin(plan, Layout.of(federation.changes["a"]))


@pytest.mark.parametrize("name", ["root", "trunk", "edge", "e"])
def test_no_other_party_of_the_federation_is_summed_with(federation: Federation, name: str) -> None:
    plan = federation.plans()["a"]
    plan.participants.append(name)
    plan.keys[name].CopyFrom(offered(IDENTITIES.get(name) or AUTHORITY.issue(name)))
    with pytest.raises(ProtocolError, match=f"'{name}', which is no silo of this cohort"):
        begin(federation, plan)


def test_the_root_does_not_stand_in_for_silos_that_it_left_out(federation: Federation) -> None:
    plan = federation.plans()["a"]
    for name in ("b", "c", "d"):
        del plan.keys[name]
    del plan.participants[:]
    plan.participants.extend(["a", "root", "trunk"])
    for name in ("root", "trunk"):
        plan.keys[name].CopyFrom(offered(IDENTITIES.get(name) or AUTHORITY.issue(name)))
    with pytest.raises(ProtocolError, match="no silo of this cohort"):
        begin(federation, plan)


def test_a_sum_of_fewer_than_the_recipes_minimum_is_refused(tmp_path: Any) -> None:
    federation = Federation(RoleDirectory(tmp_path), minimum=4)
    plan = federation.plans()["a"]
    del plan.keys["d"]
    with pytest.raises(ProtocolError, match="3 silos in a plan's sum, the recipe needs 4"):
        begin(federation, plan)


def test_no_share_is_revealed_for_fewer_survivors_than_the_recipes_minimum(tmp_path: Any) -> None:
    federation = Federation(RoleDirectory(tmp_path), minimum=4, patience=1.0)
    rounds = federation.root.rounds
    rounds._node = replace(rounds._node, minimum=3)  # the root's; the silos go by the recipe's
    ended = federation.finish(federation.begin(), ("a", "b", "c"))
    assert all("3 silos survive, the recipe needs 4" in str(error) for error in ended.values())
    assert not any(isinstance(request, pb.Reveal) for _, request in federation.root.seen)
    assert all(not tensor.any() for tensor in federation.root.planner.shared.values())


def forge(name: str) -> Callable[[str, Any], None]:
    """Acts for this silo without its signature: the keys may be known from a round that it dropped out of."""

    def lie(peer: str, request: Any) -> None:
        if peer == name and isinstance(request, pb.Agree):
            request.signature = b"forged"

    return lie


def test_a_silo_without_a_signature_does_not_count(tmp_path: Any) -> None:
    federation = Federation(RoleDirectory(tmp_path), minimum=4, patience=1.0)
    federation.root.lie = forge("d")
    ended = federation.finish(federation.begin())
    assert all("3 silos signed that their change is in the sum" in str(ended[name]) for name in "abc")
    assert not any(isinstance(request, pb.Reveal) and peer != "d" for peer, request in federation.root.seen)
    assert all(not tensor.any() for tensor in federation.root.planner.shared.values())


def test_the_only_silo_with_a_change_is_not_read(tmp_path: Any) -> None:
    federation = Federation(RoleDirectory(tmp_path), patience=1.0)

    def lie(peer: str, request: Any) -> None:
        if isinstance(request, pb.Update):
            request.learned = True

    federation.root.lie = lie
    ended = federation.finish(federation.begin(), weight={"a": 3.0, "b": 0.0, "c": 0.0, "d": 0.0})
    assert all("1 silos signed that their change is in the sum" in str(error) for error in ended.values())
    assert not any(isinstance(request, pb.Reveal) for _, request in federation.root.seen)


def test_a_silo_that_signs_nothing_ends_the_round_of_nobody_else(tmp_path: Any) -> None:
    federation = Federation(RoleDirectory(tmp_path), patience=1.0)
    federation.root.rounds._identity = IDENTITIES["root"]  # an honest root
    federation.root.lie = forge("d")
    ended = federation.finish(federation.begin())
    assert isinstance(ended["d"], IdentityError)
    assert [ended[name] for name in "abc"] == [None] * 3
    federation.assert_learned(dict.fromkeys(NAMES, 1.0))


def other_adapters(plan: pb.Plan) -> None:
    plan.adapters[0].data = bytes(len(plan.adapters[0].data) - 4) + b"\0\0\x80?"  # the last number is 1


def other_participants(plan: pb.Plan) -> None:
    plan.participants.append("z")


def other_round(plan: pb.Plan) -> None:
    plan.completed += 1


@pytest.mark.parametrize("change", [other_adapters, other_participants, other_round])
def test_of_silos_that_were_told_different_things_nothing_is_learned(
    tmp_path: Any, change: Callable[[pb.Plan], None]
) -> None:
    federation = Federation(RoleDirectory(tmp_path), patience=1.0)
    plans = federation.plans()
    own = pb.Plan()
    own.CopyFrom(plans["a"])
    change(own)
    plans["a"] = own
    for name in NAMES:
        federation.silos[name].updates.begin(plans[name], Layout.of(federation.changes[name]))
    ended = federation.finish(plans)
    assert all(ended.values())  # silo a reveals nothing; what the others reveal leaves their masks with it in the sum
    assert not any(peer == "a" and isinstance(request, pb.Reveal) for peer, request in federation.root.seen)
    assert all(not tensor.any() for tensor in federation.root.planner.shared.values())
    with pytest.raises(ProtocolError, match="a dealt shares of no secret"):  # by what an honest half of the root sees
        federation.silos.pop("a").ask().result(WAIT)
    assert federation.finish(federation.begin("bcd"), "bcd") == dict.fromkeys("bcd")  # normal service afterwards
    federation.assert_learned(dict.fromkeys("bcd", 1.0))


def test_any_part_of_a_plan_changes_its_digest() -> None:
    plan = pb.Plan(round=3, completed=2, participants=["a", "b"], sum=bytes(16), clip=0.5)
    plan.adapters.add(name="x", shape=[1], data=bytes(4))
    plan.keys["a"].masking = bytes(32)
    for change in (
        lambda one: setattr(one, "round", 4),
        lambda one: setattr(one, "completed", 1),
        lambda one: setattr(one, "clip", 0.25),
        lambda one: setattr(one, "sum", bytes(15) + b"\1"),
        lambda one: setattr(one.adapters[0], "data", bytes(3) + b"\1"),
        lambda one: setattr(one.keys["a"], "masking", bytes(31) + b"\1"),
        lambda one: one.participants.append("c"),
        lambda one: one.control.add(name="x"),
    ):
        other = pb.Plan()
        other.CopyFrom(plan)
        assert plan_digest(other) == plan_digest(plan)
        change(other)
        assert plan_digest(other) != plan_digest(plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_never_encoded(federation: Federation, value: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        Ring(3, 1.0).encode(torch.tensor([0.0, value]).numpy())
    plans = federation.begin()
    federation.changes["a"]["x"][0, 0] = value
    with pytest.raises(DataError, match="not finite"):
        federation.silos["a"].updates.pack(plans["a"], federation.changes["a"], 3.0, 1.0)
    assert not any(isinstance(request, pb.Update) for _, request in federation.root.seen)
