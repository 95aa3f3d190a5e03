"""The attacks on labels, responses, updates and membership, by command, on tiny federations without a defence."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.attacks.gradients import update_inversion
from isthmus.attacks.gradients.gradient_matching import MatcherSettings
from isthmus.audit.attack import RESULTS_NAME, AttackPlan, AttackResult, open_target, run_attacks
from isthmus.audit.target import Target
from isthmus.errors import AttackError
from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe, SecureSection
from isthmus.silo.join import greeting
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, write_rows
from tests.integration.processes import call

CHOICES = ["w40", "w71", "w12"]


def texts(count: int, seed: int, longest: int = 8) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(4, 97)}" for _ in range(draw.randint(3, longest))) + " w5" for _ in range(count)
    ]


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(f"labels/{seed}")
    return [{"prompt": text, "answer": draw.choice(CHOICES)} for text in texts(count, seed)]


def told(count: int, seed: int, longest: int = 6) -> list[dict[str, Any]]:
    return [
        {"prompt": one, "answer": two}
        for one, two in zip(texts(count, seed), texts(count, seed + 1000, longest), strict=True)
    ]


def federation(model: Path, folder: Path, make: Any, *, held_out: int = 0, rows: int = 30, **sections: Any) -> Target:
    """A recipe of two silos with rows on disk."""
    silos = []
    for seed, name in enumerate("ab"):
        silo = {"name": name, "train": str(write_rows(folder / f"{name}.jsonl", make(rows, seed)))}
        if held_out:
            silo["held_out"] = str(write_rows(folder / f"{name}-held.jsonl", make(held_out, seed + 50)))
        silos.append(silo)
    settings: dict[str, Any] = {
        "train": {"steps": 2, "rounds": 1, "batch": 4},
        "root": {"minimum": 1, "patience": 0.2},
        **sections,
    }
    return Target(make_recipe(model, silo=silos, **settings))


def ran(source: Target, folder: Path) -> Path:
    """The recipe after the rounds of silo ``a`` alone."""
    run = RunDirectory.create(folder / "run", source.recipe)
    trunk, root = TrunkService(run.recipe(), run.role("trunk")), root_service(run.recipe(), run.role("root"))
    hello = greeting(Checkpoint(run.recipe().model.path), run.recipe())
    channels = LoopbackChannel(trunk, "a", greeting=hello), LoopbackChannel(root, "a")
    Worker(run.recipe(), "a", run.role("a"), trunk=channels[0], root=channels[1]).run()
    trunk.stop()
    return run.path


def quiet(message: str) -> None:
    assert message


def found(source: Target, name: str, adversary: str, **how: Any) -> dict[str, AttackResult]:
    order = replace(AttackPlan(adversaries=(adversary,), attacks=(name,), rows=24, own_rows=30), **how)
    return {one.tokens: one for one in run_attacks(source, order, quiet)}


def value(result: AttackResult, figure: str) -> float:
    one = result.figures[figure]
    assert 0 <= one.low <= one.value <= one.high <= 1
    return one.value


CLASSIFY = {"task": {"choices": CHOICES}}


def test_labels_by_command(
    attacked_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ran(federation(attacked_model, tmp_path, labelled, **CLASSIFY), tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--attack", "labels", "--adversary", "trunk", "--adversary", "trunk+silo", "--rows", "30"]
    call(capsys, monkeypatch, "attack", str(run), *arguments).succeeded()
    written = {(one["adversary"], one["tokens"]): one for one in json.loads((run / RESULTS_NAME).read_text())}
    assert {of for adversary, of in written if adversary == "trunk"} == {"strongest", "choices", "clusters"}
    assert ("trunk+silo", "classifier") in written
    for adversary in ("trunk", "trunk+silo"):
        figures = written[adversary, "strongest"]["figures"]
        assert set(figures) == {"accuracy", "majority", "task_accuracy"}
        assert figures["accuracy"]["value"] > 0.95
        assert figures["majority"]["value"] < 0.7
        assert written[adversary, "strongest"]["notes"][0] in {"choices", "clusters", "classifier"}
    assert written["trunk+silo", "choices"]["figures"]["accuracy"]["value"] == 1.0


def test_labels_and_texts_of_choices_of_unequal_lengths(attacked_model: Path, tmp_path: Path) -> None:
    """They are filled up: gradients still tell the label, and a text among candidates is still found."""
    unequal = {"w40": "w40", "w71": "w71 w9", "w12": "w12 w9 w30"}

    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        return [{**row, "answer": unequal[row["answer"]]} for row in labelled(count, seed)]

    source = federation(attacked_model, tmp_path, rows, task={"choices": list(unequal.values())})
    for adversary in ("trunk", "trunk+silo"):
        assert value(found(source, "labels", adversary)["choices"], "accuracy") == 1.0
    assert value(found(source, "identify", "trunk+silo")["candidates"], "top1") > 0.9


@pytest.mark.parametrize(
    "boundary",
    [{"residual": True}, {"width": 8}, {"tail": 1}, {"tail": 2, "residual": True}],
    ids=["residual", "narrow", "tail", "tail-residual"],
)
def test_labels_with_less_that_crosses(attacked_model: Path, tmp_path: Path, boundary: dict[str, Any]) -> None:
    source = federation(attacked_model, tmp_path, labelled, boundary=boundary, **CLASSIFY)
    for adversary in ("trunk", "trunk+silo"):
        result = found(source, "labels", adversary)["strongest"]
        assert value(result, "accuracy") > max(0.6, value(result, "majority"))


@pytest.mark.parametrize(
    "gradient",
    [
        {"clip": 0.05, "noise": 0.0},
        {"mechanism": "dp_gaussian", "clip": 0.05, "epsilon": 1e6, "delta": 1e-5, "unit": "sequence"},
        {"mechanism": "metric", "clip": 0.05, "epsilon": 1e7},
    ],
    ids=["clip", "sequence", "metric"],
)
def test_labels_and_responses_by_any_mechanism(attacked_model: Path, tmp_path: Path, gradient: dict[str, Any]) -> None:
    source = federation(attacked_model, tmp_path, labelled, boundary={"gradient": gradient}, **CLASSIFY)
    assert value(found(source, "labels", "trunk")["choices"], "accuracy") > 0.95
    (response,) = found(source, "responses", "trunk+silo", rows=8).values()
    assert value(response, "token_accuracy") > 0.8


def test_drowned_gradients_tell_no_label(attacked_model: Path, tmp_path: Path) -> None:
    loud = {"gradient": {"clip": 0.01, "noise": 5.0}}
    source = federation(attacked_model, tmp_path, labelled, rows=60, boundary=loud, **CLASSIFY)
    by = found(source, "labels", "trunk+silo", rows=60, own_rows=60)
    assert value(by["choices"], "accuracy") < 0.6
    assert value(by["classifier"], "accuracy") < 0.6


def test_a_label_is_read_off_what_the_trunk_returned_as_well_as_the_task_does(
    attacked_model: Path, tmp_path: Path
) -> None:
    training = {"steps": 40, "rounds": 1, "batch": 8, "learning_rate": 1e-2}
    run = ran(federation(attacked_model, tmp_path, labelled, train=training, rows=16, **CLASSIFY), tmp_path)
    (inside,) = (one for of, one in found(open_target(run), "lens", "trunk+silo").items() if of == "lens")
    assert value(inside, "accuracy") == value(inside, "task_accuracy")  # the same rows, through the same top
    assert value(inside, "accuracy") > value(inside, "majority")


def test_responses_in_gradients_and_in_greedy_answers(attacked_model: Path, tmp_path: Path) -> None:
    source = federation(attacked_model, tmp_path, told)
    (solved,) = found(source, "responses", "trunk", rows=8).values()
    assert solved.tokens == "response"
    assert value(solved, "token_accuracy") > 0.95
    assert value(solved, "rougeL") > 0.95
    (read,) = found(source, "lens", "trunk", rows=4, inference=True).values()
    assert value(read, "token_accuracy") == 1.0
    (guessed,) = found(source, "lens", "trunk", rows=8).values()
    assert value(guessed, "token_accuracy") < 0.5  # the model never learned these answers


EVERY = ["q_proj", "k_proj", "v_proj", "o_proj"]
ONE_STEP = {"train": {"steps": 1, "rounds": 1, "batch": 1, "optimizer": "sgd", "learning_rate": 0.1}}


def test_an_update_of_one_step_of_sgd_is_searched_exactly(
    attacked_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = federation(
        attacked_model, tmp_path, labelled, lora={"rank": 16, "targets": EVERY}, **ONE_STEP, **CLASSIFY
    ).recipe
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.toml())
    (clean,) = found(open_target(path), "dager", "aggregator").values()
    assert clean.tokens == "update"
    assert clean.notes == ()
    assert value(clean, "rouge1") > 0.8  # but for the label, which leaves no trace in bottom
    monkeypatch.setenv("COLUMNS", "200")
    shown = call(capsys, monkeypatch, "attack", str(path), "--adversary", "aggregator", "--attack", "dager")
    shown.succeeded()
    assert "ROUGE-1" in shown.out


def test_what_stands_in_the_way_of_an_exact_search_is_told(attacked_model: Path, tmp_path: Path) -> None:
    noised = {"boundary": {"update": {"noise": 0.1}}}
    (result,) = found(
        federation(attacked_model, tmp_path, labelled, **noised, **CLASSIFY), "dager", "aggregator"
    ).values()
    assert any("adamw" in one for one in result.notes)
    assert any("2 steps" in one for one in result.notes)
    assert value(result, "rouge1") < 0.5


def test_a_text_is_found_by_gradient_matching(
    attacked_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(count: int, _: int) -> list[dict[str, Any]]:
        return [{"prompt": "w23 w60 w17", "answer": "w40"}] * count

    monkeypatch.setattr(
        update_inversion, "SETTINGS", MatcherSettings(starts=16, steps=200, every=50, moves=60, tries=4)
    )
    lora = {"rank": 8, "targets": EVERY}
    source = federation(attacked_model, tmp_path, short, rows=2, lora=lora, **ONE_STEP, **CLASSIFY)
    (result,) = found(source, "gradient-matching", "aggregator").values()
    assert "away" in result.notes[-1]
    assert value(result, "rouge1") > 0.7


def test_membership_of_an_overfit_run(attacked_model: Path, tmp_path: Path) -> None:
    training = {"steps": 60, "rounds": 1, "batch": 8, "learning_rate": 1e-2}
    targets = {"rank": 8, "targets": EVERY}
    source = federation(attacked_model, tmp_path, told, rows=8, held_out=16, train=training, lora=targets)
    by = found(open_target(ran(source, tmp_path)), "membership", "outsider")
    assert set(by) == {"strongest", "loss", "difficulty", "likelihood"}
    assert by["strongest"].notes[0] in by
    assert by["strongest"].rows == 24
    assert value(by["strongest"], "auc") > 0.95
    assert value(by["loss"], "auc") > 0.9
    assert 0 <= value(by["likelihood"], "tpr_at_1_fpr") <= 1
    few = found(open_target(tmp_path / "run"), "membership", "outsider", references=0)
    assert set(few) == {"strongest", "loss", "difficulty"}
    assert "no likelihood ratio" in few["strongest"].notes[1]


@pytest.mark.parametrize(
    ("name", "adversary", "how", "complaint"),
    [
        ("labels", "outsider", {}, "'outsider' sees no crossings"),
        ("labels", "trunk", {"inference": True}, "no gradients cross in inference"),
        ("responses", "aggregator", {}, "'aggregator' sees no crossings"),
        ("dager", "trunk+silo", {}, "'trunk\\+silo' sees no updates"),
        ("gradient-matching", "outsider", {}, "'outsider' sees no updates"),
        ("membership", "trunk", {}, "'trunk' sees no candidates"),
        ("identify", "trunk", {}, "'trunk' sees no candidates"),
        ("identify", "trunk+silo", {"inference": True}, "identify is of training rows"),
        ("membership", "outsider", {}, "nothing was trained"),
        ("membership", "outsider", {"references": -1}, "-1 reference models"),
    ],
)
def test_impossible_attacks_are_named(
    attacked_model: Path, tmp_path: Path, name: str, adversary: str, how: dict[str, Any], complaint: str
) -> None:
    source = federation(attacked_model, tmp_path, labelled, **CLASSIFY)
    with pytest.raises(AttackError, match=complaint):
        found(source, name, adversary, **how)


def test_free_text_has_no_labels_and_a_run_without_held_out_rows_no_others(
    attacked_model: Path, tmp_path: Path
) -> None:
    source = federation(attacked_model, tmp_path, told)
    with pytest.raises(AttackError, match="answers are free text"):
        found(source, "labels", "trunk")
    with pytest.raises(AttackError, match="a has no held-out rows"):
        found(open_target(ran(source, tmp_path)), "membership", "outsider")


@pytest.mark.parametrize("name", ["labels", "responses"])
def test_without_gradients_the_command_says_so(
    attacked_model: Path,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = {"gradients": False, "residual": True}
    path = tmp_path / "recipe.toml"
    path.write_text(federation(attacked_model, tmp_path, labelled, boundary=silent, **CLASSIFY).recipe.toml())
    refused = call(capsys, monkeypatch, "attack", str(path), "--attack", name)
    assert refused.code == 1
    assert "boundary.gradients = false" in refused.err
    call(capsys, monkeypatch, "attack", str(path), "--attack", "lens", "--rows", "6").succeeded()


def test_a_frozen_bottom_leaves_no_gradient_to_search(attacked_model: Path, tmp_path: Path) -> None:
    source = federation(attacked_model, tmp_path, labelled, lora={"freeze_bottom": True}, **CLASSIFY)
    with pytest.raises(AttackError, match="no gradient of the first block's adapter"):
        found(source, "dager", "aggregator")


def test_masks_leave_the_aggregator_no_update_to_attack(attacked_model: Path, tmp_path: Path) -> None:
    source = federation(attacked_model, tmp_path, labelled, **CLASSIFY)
    masked = source.recipe.federation.model_copy(update={"secure": SecureSection(masks=True)})
    source = replace(source, recipe=source.recipe.model_copy(update={"federation": masked}))
    with pytest.raises(AttackError, match="only their sum"):
        found(source, "dager", "aggregator")


def test_rows_are_identified_among_candidates_by_what_little_crosses(two_silos: Target) -> None:
    def named(noise: float) -> tuple[float, float]:
        boundary = {"tail": 1, "width": 8, "forward": {"clip": 1.0, "noise": noise}}
        values = two_silos.recipe.model_dump(exclude_none=True)
        values["boundary"] |= boundary
        order = AttackPlan(attacks=("identify",), rows=10, own_rows=30)
        (one,) = run_attacks(replace(two_silos, recipe=Recipe.of(values)), order, lambda told: None)
        assert (one.tokens, one.notes) == ("candidates", ("among 40",))
        assert one.figures["chance"].value == 1 / 40
        return one.figures["top1"].value, one.figures["top10"].value

    assert named(0.0) == (1.0, 1.0)
    first, ten = named(1e6)
    assert first <= 0.2
    assert ten <= 0.7
