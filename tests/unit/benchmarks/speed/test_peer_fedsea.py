"""What the comparison with FedSEA-LLaMA's own code does around it: the model's parts, the notes, the refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.speed.peer_fedsea import __main__ as peer
from benchmarks.speed.peer_fedsea import model
from benchmarks.speed.peer_fedsea.checkout import IGNORED, NEEDED, PAD, Checkout, CheckoutError, padded, read
from benchmarks.speed.peer_fedsea.meter import Meter

ENDS = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight")


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A model of 30 blocks made 32, whose tensors hold the numbers of the blocks that they come from."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"model.layers.{block}.{end}": torch.full((2,), block + 1.0) for block in range(30) for end in ENDS}
    ends = {"model.embed_tokens.weight": torch.zeros(3), "model.norm.weight": torch.ones(2)}
    save_file(tensors | ends, source / "model.safetensors")
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text(json.dumps({"rope_parameters": {"rope_theta": 1e5}, "num_hidden_layers": 30}))
    return model.deepen(source, tmp_path / "deep")


def test_two_blocks_in_the_middle_add_nothing(deep: Path) -> None:
    found = load_file(deep / "model.safetensors")
    upper, lower = ([float(found[f"model.layers.{block}.{end}"][0]) for block in range(32)] for end in ENDS[:2])
    assert upper == lower == [*range(1, 16), 0, 0, *range(16, 31)]
    assert json.loads((deep / "config.json").read_text())["num_hidden_layers"] == 32


def test_parts_hold_the_blocks_that_the_other_code_looks_for(deep: Path, tmp_path: Path) -> None:
    model.divide(deep, tmp_path / "run")
    found = {}
    for folder, letter in (("clientA", "A"), ("server", "B"), ("clientC", "C")):
        part = torch.load(tmp_path / "run" / folder / f"pytorch_model_{letter}.bin")
        blocks = [model.block_of(name) for name in part if name.endswith("up_proj.weight")]
        first = float(part["model.layers.0.mlp.up_proj.weight"][0])
        found[letter] = (
            sorted(one for one in blocks if one is not None),
            first,
            {n for n in part if "layers" not in n},
        )
    assert found["A"] == (list(range(5)), 1.0, {"model.embed_tokens.weight"})
    assert found["B"] == (list(range(30)), 2.0, set())
    assert found["C"] == (list(range(5)), 26.0, {"model.norm.weight", "lm_head.weight"})
    assert json.loads((tmp_path / "run" / "server" / "config.json").read_text())["rope_theta"] == 1e5


def test_rows_are_filled_up_on_the_left() -> None:
    batch = padded([[7, 8], [9]], 3)
    assert batch["input_ids"].tolist() == [[PAD, 7, 8], [PAD, PAD, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 7, 8], [IGNORED, IGNORED, 9]]


def test_notes_are_of_both_processes(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "notes.jsonl", os.getpid())
    meter.note(tokens=0)
    meter.note(tokens=3)
    first, second = read(tmp_path / "notes.jsonl")
    assert second["seconds"] >= first["seconds"]
    assert second["processor"] >= first["processor"] > 0
    assert first["peak"] > 2**20
    assert second["tokens"] == 3


def test_the_first_step_and_the_first_pass_are_not_timed() -> None:
    notes = [{"seconds": at, "tokens": tokens} for at, tokens in ((0.0, 0), (9.0, 1), (10.0, 1), (13.0, 3))]
    assert peer.a_step(notes, "seconds") == 2.0
    assert peer.a_token(notes, "seconds") == 1.0


def test_a_wrong_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckoutError, match=r"no checkout of FedSEA-LLaMA: it has no src/flserver.py"):
        Checkout(tmp_path, tmp_path / "python", tmp_path)
    for name in NEEDED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CheckoutError, match="make build/fedsea/ready"):
        Checkout(tmp_path, tmp_path / "python", tmp_path)


def test_without_a_checkout_the_command_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["peer_fedsea"])
    with pytest.raises(SystemExit) as ended:
        peer.main()
    assert ended.value.code == 2
    assert "FEDSEA=path" in capsys.readouterr().err
