"""What the split model calls is what the silo's rooms offer, with the same arguments."""

from __future__ import annotations

import inspect

import pytest

from isthmus.model import interfaces
from isthmus.silo.boundary import Boundary
from isthmus.silo.defence.guard import Guard
from isthmus.silo.defence.shield import Shield
from isthmus.silo.drafting.draft import Draft
from isthmus.silo.records import Records
from isthmus.silo.released import Released
from isthmus.silo.remote import RemoteTrunk

PAIRS = [
    (interfaces.TrunkModule, RemoteTrunk, ["open_session"]),
    (interfaces.ReleasedExamples, Released, ["number", "__contains__"]),
    (interfaces.RecordFinder, Records, ["subjects"]),
    (interfaces.ModelBoundary, Boundary, ["clipped"]),
    (interfaces.BottomShield, Shield, ["hidden"]),
    (interfaces.BottomGuard, Guard, ["__call__"]),
    (interfaces.Drafting, Draft, ["candidates"]),
]


@pytest.mark.parametrize(("wanted", "offered", "methods"), PAIRS, ids=[wanted.__name__ for wanted, _, _ in PAIRS])
def test_each_is_implemented_with_the_same_arguments(wanted: type, offered: type, methods: list[str]) -> None:
    for name in methods:
        expected, found = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (wanted, offered))
        assert found[: len(expected)] == expected


def test_every_protocol_is_tested() -> None:
    defined = {one for one in vars(interfaces).values() if getattr(one, "__module__", "") == interfaces.__name__}
    assert {wanted for wanted, _, _ in PAIRS} == {one for one in defined if inspect.isclass(one)}
