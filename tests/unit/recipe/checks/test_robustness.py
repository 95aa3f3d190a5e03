"""Rules against malicious silos: what they compare, and how many contributions they need."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.recipe import Recipe
from tests.unit.recipe.refusals import OUT, Case, assert_mended, changed, least, name_of

ROBUST = "federation.robust"


def silos(count: int, minimum: int | None = None) -> dict[str, Any]:
    named = [{"name": f"s{number}", "train": "rows.jsonl"} for number in range(count)]
    return {"silo": named} | ({} if minimum is None else {"root.minimum": minimum})


REFUSED: list[Case] = [
    (
        {"federation.secure": True, ROBUST: "median"},
        "federation.robust: under masks the root sees one sum",
        "federation.secure.masks = false",
        {"federation.secure": False},
    ),
    (
        {"federation.secure": True, ROBUST: {"mix": True}},
        "federation.robust: under masks the root sees one sum",
        "mix = false",
        {f"{ROBUST}.mix": False},
    ),
    (
        silos(2) | {ROBUST: "median"},
        "of 2 silos 1 may be malicious, and against that 'median' needs 3",
        "have more silos",
        silos(3),
    ),
    (
        silos(4) | {ROBUST: "krum"},
        "of 4 silos 1 may be malicious, and against that 'krum' needs 5",
        "change federation.robust.rule",
        {ROBUST: "median"},
    ),
    (
        silos(9, 4) | {ROBUST: "krum"},
        "of 4 silos 1 may be malicious",
        "raise root.minimum",
        {"root.minimum": 5},
    ),
    (silos(6) | {ROBUST: "bulyan"}, "'bulyan' needs 7", "have more silos", silos(7)),
    (
        silos(10) | {ROBUST: {"rule": "bulyan"}},
        "of 10 silos 2 may be malicious, and against that 'bulyan' needs 11",
        "or malicious",
        {f"{ROBUST}.malicious": 0.1},
    ),
    (silos(2) | {ROBUST: {"mix": True}}, "'mean' needs 3", "have more silos", silos(3)),
    (
        silos(5) | {ROBUST: {"rule": "fltrust"}},
        "federation.robust.trusted: the rule 'fltrust' needs it",
        "name a silo",
        {f"{ROBUST}.trusted": "s1"},
    ),
    (
        silos(5) | {ROBUST: {"trusted": "s1"}},
        "the rule 'fltrust' needs it, and no other takes it",
        "leave it out",
        {f"{ROBUST}.trusted": OUT},
    ),
    (
        silos(2) | {ROBUST: {"rule": "fltrust", "trusted": "x"}},
        "federation.robust.trusted: 'x' sends nothing to the root",
        "use one of: s0, s1",
        {f"{ROBUST}.trusted": "s0"},
    ),
    (
        silos(5) | {ROBUST: {"rule": "fltrust", "trusted": "s1", "mix": True}},
        "federation.robust.mix: the trusted change must stay as it is",
        "set mix = false",
        {f"{ROBUST}.mix": False},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_a_rule_that_could_not_withstand_what_it_is_for(case: Case) -> None:
    assert_mended(case)


@pytest.mark.parametrize(
    ("changes", "robust"),
    [
        (silos(5), {"rule": "median", "malicious": 0.499}),
        (silos(5, 5), {"rule": "krum"}),
        (silos(9, 7), {"rule": "bulyan"}),
        (silos(1), {"rule": "fltrust", "trusted": "s0"}),
        (silos(5, 3), {"rule": "trimmed-mean", "mix": True}),
    ],
    ids=str,
)
def test_a_rule_that_can(changes: dict[str, Any], robust: dict[str, Any]) -> None:
    assert Recipe.of(changed(least(), changes | {ROBUST: robust})).federation.robust.rule == robust["rule"]


def test_edges_are_counted_where_they_send_to_the_root() -> None:
    edges = [{"name": name, "address": "localhost:1", "silos": list(name)} for name in ("ab", "cd")]
    alone = {"silo": least("abcd")["silo"], "edge": edges, ROBUST: "median"}
    more = [*edges, {"name": "ef", "address": "localhost:1", "silos": ["e", "f"]}]
    mended = {"silo": least("abcdef")["silo"], "edge": more}
    assert_mended(
        (alone, "of 2 edges 1 may be malicious, and against that 'median' needs 3", "have more edges", mended)
    )
