"""In every mode: no tensor leaves before its event is on the disk, and its noise is what the event says.

Shapes: T tokens, W what crosses of the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from transformers import PreTrainedTokenizerFast

from isthmus.federation.aggregator import root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.analytic import gaussian_noise
from isthmus.privacy.events import Release
from isthmus.silo.join import greeting
from isthmus.silo.worker import Worker
from isthmus.storage.record import RunDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import make_recipe, save_tiny_model, write_rows
from tests.features.silo.witness import ACTS, Party, Sighting, Watched, Witness

CLIP, EPSILON, DELTA = 0.5, 2.0, 1e-5
PATHS: dict[type[Any], str] = {
    pb.Forward: "forward",
    pb.Keep: "forward",
    pb.Decode: "forward",
    pb.Backward: "gradient",
    pb.Update: "update",
}
MECHANISMS: dict[str, dict[str, Any]] = {
    "gaussian": {"clip": CLIP, "noise": 0.7},
    "token": {"mechanism": "dp_gaussian", "clip": CLIP, "epsilon": EPSILON, "delta": DELTA},
    "sequence": {"mechanism": "dp_gaussian", "clip": CLIP, "epsilon": EPSILON, "delta": DELTA, "unit": "sequence"},
    "metric": {"mechanism": "metric", "clip": CLIP, "epsilon": 9.0},
}
CLASSES = {"detectors": [], "fields": {"who": "high"}, "classes": {"high": {"noise": 3.0}}}
ONCE = {"boundary": {"release_once": True}, "lora": {"freeze_bottom": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{name} noise": {"mechanism": name} for name in MECHANISMS},
    **{f"{name} noise by class": {"mechanism": name, "sensitivity": CLASSES} for name in MECHANISMS},
    **{f"codec {name}": {"boundary": {"codec": name}} for name in codec.CODEC_NAMES if name != "fp32"},
    "attention averted": {"sensitivity": {**CLASSES, "attention": 3.0}},
    "tail": {"boundary": {"tail": 4}},
    "width": {"boundary": {"width": 8}},
    "residual": {"boundary": {"residual": True}},
    "tail, width, residual": {"boundary": {"tail": 4, "width": 8, "residual": True}},
    "no gradients": {"boundary": {"residual": True, "gradients": False}},
    "once": ONCE,
    "once, forgotten by the trunk": {**ONCE, "trunk": {"kept_bytes": 16_000}},
    "once, tail, width, residual": {
        **ONCE,
        "boundary": {"release_once": True, "tail": 4, "width": 8, "residual": True},
    },
}
EVERY = ("gaussian noise", "sequence noise by class", "tail, width, residual")
"""Settings that are tried in every act; the others in a few."""
FEW = ("training", "micro-batches", "greedy")
MODES = [(setting, act) for setting in SETTINGS for act in (ACTS if setting in EVERY else FEW)]
COARSE = {
    "int4": 0.05,
    "int8": 0.01,
    "bf16": 0.01,
    **{f"range-{step:g}": step**2 for step in (0.25, 0.5, 0.75, 1.0, 2.0)},
}
"""What rounding may add to the noise's deviation."""
ROWS = [
    {
        "who": " ".join(f"w{20 + (7 * n + m) % 30}" for m in range(n + 3)),
        "note": " ".join(f"w{50 + m % 5}" for m in range(9)),
        "told": " ".join(f"w{60 + (n + m) % 30}" for m in range(9)),
    }
    for n in range(8)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Party]]:
    """A party in one of the settings."""
    started: list[Party] = []
    # transformers gives this family a tokenizer of its own, which splits no words
    monkeypatch.setattr("isthmus.silo.join.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))

    def one(name: str) -> Party:
        started.append(Party(recipe_of(model, rows, **SETTINGS[name]), tmp_path / "party"))
        return started[-1]

    yield one
    for each in started:
        each.close()


def recipe_of(model: Path, rows: str, *, mechanism: str = "gaussian", boundary: Any = None, **sections: Any) -> Any:
    how = MECHANISMS[mechanism]
    return make_recipe(
        model,
        boundary={"forward": how, "gradient": how, **(boundary or {})},
        task={"prompt": "{who} {note}", "answer": " {told}"},
        silo=[{"name": "a", "train": rows, "held_out": rows}],
        train={"steps": 99, "batch": 4, **sections.pop("train", {})},
        **sections,
    )


def assert_each_has_its_event(witness: Witness) -> list[tuple[Sighting, Release]]:
    """As each tensor left first, its event was on the disk; beside those there is none."""
    fresh, events = witness.fresh(), witness.events()
    assert len(fresh) == len(events) > 0
    for number, (sighting, event) in enumerate(zip(fresh, events, strict=True)):
        assert sighting.noted > number, "it left before its event was on the disk"
        assert event.path == PATHS[type(sighting.request)]
        assert event.size == sum(len(tensor.data) for tensor in sighting.tensors)
        if event.path != "update":
            (matrix,) = sighting.tensors
            assert (event.rows, event.width) == (matrix.rows, matrix.width)
    return list(zip(fresh, events, strict=True))


def clipped(mechanism: str, h_TW: torch.Tensor, lengths: tuple[int, ...], factors_T: torch.Tensor) -> torch.Tensor:
    """Row by row, or sequence by sequence in the norm that weighs rows by their factors."""
    if mechanism != "sequence":
        return h_TW * (CLIP / h_TW.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    pieces = zip(h_TW.split(lengths), factors_T.split(lengths), strict=True)
    return torch.cat([h * min(1.0, CLIP / max(float((h / f[:, None]).norm()), 1e-30)) for h, f in pieces])


def deviation(mechanism: str, width: int) -> float:
    """Stated, on each coordinate."""
    how = MECHANISMS[mechanism]
    if mechanism == "metric":
        return (width + 1) ** 0.5 / float(how["epsilon"])
    return float(how.get("noise") or 2 * CLIP * gaussian_noise(EPSILON, DELTA))


def noise_of(party: Party, mechanism: str, name: str) -> dict[str, torch.Tensor]:
    """By path, what was added to the clipped tensors over what was stated, ``[T, W]``."""
    drawn: dict[str, list[torch.Tensor]] = {}
    for sighting, (h_TW, path, subjects) in zip(party.witness.fresh(), party.given, strict=True):
        (matrix,) = sighting.tensors
        factors_T = torch.ones(len(h_TW)) if subjects.factors_T is None else subjects.factors_T
        sent_TW = codec.decode(matrix, rows=len(h_TW), width=h_TW.shape[1], codec=name).float()
        added_TW = sent_TW - clipped(mechanism, h_TW, subjects.lengths, factors_T)
        drawn.setdefault(path, []).append(added_TW / factors_T[:, None] / deviation(mechanism, h_TW.shape[1]))
    return {path: torch.cat(pieces) for path, pieces in drawn.items()}


def assert_unit_and_independent(drawn_TW: torch.Tensor, rounding: float) -> None:
    rows, width = drawn_TW.shape
    assert rows >= 60
    slack = 5 / drawn_TW.numel() ** 0.5
    assert float(drawn_TW.square().mean().sqrt()) == pytest.approx(1.0, abs=slack + rounding)
    assert abs(float(drawn_TW.mean())) < slack
    unit_TW = drawn_TW / drawn_TW.norm(dim=1, keepdim=True)
    length = float(unit_TW.sum(dim=0).square().sum()) * width / rows  # of independent directions about χ² of so many
    assert chi2.ppf(1e-9, width) < length < chi2.isf(1e-9, width)
    cosines = (unit_TW @ unit_TW.T)[torch.triu(torch.ones(rows, rows), diagonal=1).bool()]
    assert float(cosines.square().mean()) == pytest.approx(1 / width, rel=0.15)
    assert float(cosines.max()) < 0.999, "two tokens have the same draw"
    lengths_T = drawn_TW.norm(dim=1)
    assert abs(float(torch.corrcoef(torch.stack([lengths_T[:-1], lengths_T[1:]]))[0, 1])) < 5 / rows**0.5


@pytest.mark.parametrize(("setting", "act"), MODES)
def test_no_tensor_leaves_before_its_event_and_its_noise_is_what_was_stated(
    start: Callable[[str], Party], setting: str, act: str
) -> None:
    party = start(setting)
    asked = SETTINGS[setting]
    mechanism = asked.get("mechanism", "gaussian")
    ACTS[act](party)
    for _, event in assert_each_has_its_event(party.witness):
        how = MECHANISMS[mechanism]
        stated = 1 / how["epsilon"] if mechanism == "metric" else deviation(mechanism, event.width)
        assert (event.clip, event.noise) == (CLIP, pytest.approx(stated))
        assert event.mechanism == how.get("mechanism", "gaussian")
    name = asked.get("boundary", {}).get("codec", "fp32")
    found = noise_of(party, mechanism, name)
    trains, gradients = act in ("training", "micro-batches"), asked.get("boundary", {}).get("gradients", True)
    assert found.keys() == ({"forward", "gradient"} if trains and gradients else {"forward"})
    for drawn_TW in found.values():
        if act != "without cache":  # too few rows to measure on
            assert_unit_and_independent(drawn_TW, COARSE.get(name.removesuffix("+zstd"), 1e-3))


@pytest.mark.parametrize("act", ["training", "micro-batches", "evaluation"])
def test_what_goes_again_is_the_same_draw(start: Callable[[str], Party], act: str) -> None:
    """The modes above do send something again: otherwise they would show nothing of it."""
    party = start("once, forgotten by the trunk")
    ACTS[act](party)
    kept = [one for one in party.witness.seen if isinstance(one.request, pb.Keep)]
    assert len(kept) > len(ROWS)
    assert len({one.request.example for one in kept}) == len({bytes(one.tensors[0].data) for one in kept}) == len(ROWS)


@pytest.mark.parametrize("sections", [{}, ONCE, {"train": {"micro_batches": 2}}], ids=["plain", "once", "micro"])
def test_a_whole_federation(model: Path, tmp_path: Path, sections: Any) -> None:
    """Rounds, measuring and updates, to trunk and root, as the worker runs them."""
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    train = {"rounds": 2, "steps": 2, "evaluate": True, **sections.get("train", {})}
    boundary = {"update": {"clip": 1.0, "noise": 0.5}, **sections.get("boundary", {})}
    recipe = recipe_of(model, rows, **{**sections, "boundary": boundary, "train": train})
    run = RunDirectory.create(tmp_path / "run", recipe)
    trunk, root = TrunkService(recipe, run.role("trunk")), root_service(recipe, run.role("root"))
    witness = Witness(run.role("a").path / "ledger.jsonl")
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    ways = {"trunk": Watched(trunk, "a", greeting=hello), "root": Watched(root, "a")}
    for way in ways.values():
        way.witness = witness
    worker = Worker(recipe, "a", run.role("a"), **ways)
    worker.run()
    worker.close()
    trunk.stop()
    paths = [event.path for _, event in assert_each_has_its_event(witness)]
    assert (paths.count("update"), paths.count("gradient")) == (2, 2 * 2 * train.get("micro_batches", 1))
    assert paths.count("forward") > paths.count("gradient")  # measuring sends, too
