"""Methods that are refused say why, and what to do."""

from __future__ import annotations

import copy
import pickle

import pytest

from isthmus.errors import NotSupportedError
from isthmus.model.refusals import (
    CACHE_REFUSALS,
    CLASS_REFUSALS,
    GENERATION_REFUSALS,
    REFUSALS,
    Refusal,
    refuse,
    refusing,
)
from isthmus.model.split import SplitForCausalLM

REFUSAL = Refusal("it cannot", "do not")


@refusing({"move": REFUSAL, "__deepcopy__": REFUSAL, "__reduce_ex__": REFUSAL}, {"make": REFUSAL})
class Thing:
    """A class of which some methods are refused."""

    def stay(self) -> str:
        return "here"


def test_refused_methods_raise_their_refusal() -> None:
    thing = Thing()
    assert thing.stay() == "here"
    for act in (lambda: thing.move(1), lambda: copy.deepcopy(thing), lambda: pickle.dumps(thing), lambda: Thing.make()):
        with pytest.raises(NotSupportedError, match="it cannot") as caught:
            act()
        assert caught.value.remedy == "do not"


def test_a_refusal_by_itself_names_what_was_asked() -> None:
    with pytest.raises(NotSupportedError, match="half: it cannot"):
        refuse("half", REFUSAL)


def test_every_refusal_has_a_reason_and_a_remedy() -> None:
    for table in (REFUSALS, CLASS_REFUSALS, CACHE_REFUSALS, GENERATION_REFUSALS):
        for name, refusal in table.items():
            assert len(refusal.reason) > 10, name
            assert len(refusal.remedy) > 10, name


def test_refused_methods_are_those_that_transformers_has() -> None:
    """A method that transformers renames would otherwise be open again without a word."""
    parents = {name for base in SplitForCausalLM.__mro__[1:] for name in vars(base)}
    assert ({*REFUSALS, *CLASS_REFUSALS} - parents) <= {"__deepcopy__"}
