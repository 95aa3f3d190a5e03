"""Names of parties, and trees of silos and edges."""

from __future__ import annotations

import pytest

from tests.unit.recipe.refusals import OUT, Case, assert_mended, name_of

EDGE = {"name": "e", "address": "localhost:1", "silos": ["a", "b"]}
OTHER = {"name": "f", "address": "localhost:2", "silos": []}
CIRCLE = [EDGE | {"parent": "f"}, OTHER | {"parent": "e"}]
REFUSED: list[Case] = [
    ({"silo.1.name": "a"}, "the name 'a' is given twice", "rename one", {"silo.1.name": "d"}),
    ({"edge": [EDGE | {"name": "a"}]}, "the name 'a' is given twice", "rename one", {"edge.0.name": "e"}),
    *(
        ({"silo.0.name": role}, f"the name {role!r} is taken", "another name", {"silo.0.name": "d"})
        for role in ("trunk", "root", "ca")
    ),
    ({"edge": [EDGE | {"silos": ["z"]}]}, "edge 'e': no silo is called 'z'", "name silos", {"edge.0.silos": ["c"]}),
    ({"edge": [EDGE | {"parent": "f"}]}, "parent = 'f' is no other edge", "leave it out", {"edge.0.parent": OUT}),
    ({"edge": [EDGE | {"sibling": "e"}]}, "sibling = 'e' is no other edge", "leave it out", {"edge.0.sibling": OUT}),
    (
        {"edge": [EDGE, OTHER | {"silos": ["a"]}]},
        "the silo 'a' has two edges",
        "leave it to one",
        {"edge.1.silos": ["c"]},
    ),
    ({"edge": [EDGE | {"silos": []}]}, "the edge 'e' has neither silos nor edges", "leave it out", {"edge": OUT}),
    (
        {"edge": [EDGE, OTHER | {"sibling": "e"}]},
        "the edge 'f' has neither silos nor edges",
        "give it some",
        {"edge.1.silos": ["c"]},
    ),
    (
        {"edge": [EDGE | {"sibling": "f", "parent": "f"}, OTHER]},
        "edge 'e': sibling 'f' has no silos",
        "leave sibling out",
        {"edge.0.sibling": OUT},
    ),
    ({"edge": [EDGE | {"minimum": 3}]}, "e.minimum: 3 silos needed but 2 listed", "lower it", {"edge.0.minimum": 2}),
    ({"root.minimum": 4}, "root.minimum: 4 silos needed but 3 listed", "lower it", {"root.minimum": 3}),
    ({"edge": CIRCLE}, "edge 'e' is above itself", "let its parents end at the root", {"edge.1.parent": OUT}),
]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_is_no_tree_is_refused(case: Case) -> None:
    assert_mended(case)
