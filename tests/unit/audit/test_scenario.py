"""A scenario: whose rows are attacked, what each adversary's view holds, and what a plan cannot ask for."""

from __future__ import annotations

import pytest

from isthmus.attacks.knowledge import Knowledge
from isthmus.audit.attack import run_attacks
from isthmus.audit.scenario import AttackPlan, Scenario
from isthmus.audit.target import Target
from isthmus.errors import AttackError, RecipeError


def scenario(target: Target, **plan: object) -> Scenario:
    return Scenario(target, AttackPlan(**{"rows": 4, "own_rows": 6, **plan}), lambda message: None)  # type: ignore[arg-type]


def test_the_first_silo_is_attacked_with_the_others_help(two_silos: Target) -> None:
    made = scenario(two_silos)
    assert made.victim == "a"
    assert len(made.rows) == 4
    assert len(made.captured.crossings) == 4
    view = made.view("trunk+silo")
    assert (len(view.crossings), len(view.pairs), view.candidates) == (4, 6, ())
    assert all(not silo.train for silo in view.recipe.silo)


def test_each_adversary_sees_its_own(two_silos: Target) -> None:
    made = scenario(two_silos, attacks=("lens",))
    assert not made.view("trunk").pairs
    assert made.view("outsider").crossings == ()
    assert made.view("trunk").steering is None
    assert not made.view("root+trunk").pairs


def test_of_rows_that_were_generated_no_active_attack_is_made(two_silos: Target) -> None:
    made = AttackPlan(("root+trunk",), ("steering",), inference=True)
    with pytest.raises(AttackError, match="the attack steering is of training rows"):
        run_attacks(two_silos, made, lambda message: None)


def test_a_silo_with_a_cut_of_its_own_is_attacked_at_its_depth(two_silos: Target) -> None:
    """By whoever knows crossings of that depth: another silo's teach nothing."""
    silos = [one.model_copy(update={"bottom": 2} if one.name == "a" else {}) for one in two_silos.recipe.silo]
    target = Target(two_silos.recipe.model_copy(update={"silo": tuple(silos)}))
    made = scenario(target, attacks=("lens",))
    view = made.view("trunk")
    assert len(view.crossings) == 4
    knowledge = Knowledge(view)
    assert (knowledge.cut.bottom, knowledge.bottom.config.num_hidden_layers) == (2, 2)
    with pytest.raises(AttackError, match="no silo colludes against a, whose cut the others do not have"):
        made.view("trunk+silo")
    alike = [one.model_copy(update={"bottom": 2}) for one in two_silos.recipe.silo]
    both = Target(two_silos.recipe.model_copy(update={"silo": tuple(alike)}))
    assert len(scenario(both).view("trunk+silo").pairs) == 6


def test_candidates_hold_the_attacked_rows_in_no_telling_order(two_silos: Target) -> None:
    made = scenario(two_silos, candidates=10)
    assert len(made.candidates) == 10
    assert all(any(row is one for one in made.candidates) for row in made.rows)


def test_what_a_plan_cannot_ask_for_is_refused(two_silos: Target) -> None:
    with pytest.raises(RecipeError, match="no silo 'west'"):
        scenario(two_silos, victim="west")
    with pytest.raises(AttackError, match="colludes"):
        scenario(two_silos, colluder="a").view("trunk+silo")
    with pytest.raises(AttackError):
        _ = scenario(two_silos, candidates=4).candidates
    with pytest.raises(AttackError):
        _ = scenario(two_silos).membership_rows
