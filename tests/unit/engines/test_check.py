"""``isthmus check``: a verdict on a model of one's own, through the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import isthmus.model.cut
import isthmus.trunk.packed_attention
from isthmus.cli.main import main
from isthmus.engines.check import check_model
from isthmus.errors import ModelError
from isthmus.model.cut import Cut
from isthmus.model.families import FAMILIES, Family
from tests.oracle.twins import save_vivid_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vivid_model("smollm3", tmp_path_factory.mktemp("model"))


def checked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["isthmus", "check", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3", "llama4"])
def test_a_model_that_is_equal(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with experts and sinks, the text part of a multimodal one, one whose attention is in chunks."""
    assert checked(monkeypatch, str(save_vivid_model(family, tmp_path)), "--cut", "2,1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1].startswith(f"equal: {tmp_path} with 2 blocks at the bottom and 1 at the top computes what")


def test_block_types_that_are_not_sliced_are_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isthmus.model.cut, "PER_BLOCK", ())
    assert checked(monkeypatch, str(folder), "--cut", "1,2") == 1
    out = capsys.readouterr().out
    assert "NOT logits of rows padded on the left:" in out
    assert "not equal: " in out.splitlines()[-1]


def test_a_pass_that_forgets_whose_tokens_are_whose_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def positions(self: object, device: torch.device) -> torch.Tensor:
        return torch.arange(sum(self.lengths), device=device).unsqueeze(0)  # type: ignore[attr-defined]

    monkeypatch.setattr(isthmus.trunk.packed_attention.PackedSequences, "positions", positions)
    result = check_model(str(folder), Cut(1, 1))
    assert not result.equal
    assert any("shared" in one.what for one in result.comparisons if not one.equal)


def test_a_row_that_lacks_a_multiplier_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FAMILIES, "granite", Family())
    assert checked(monkeypatch, str(save_vivid_model("granite", tmp_path))) == 1
    assert "changes hidden states before its first block" in capsys.readouterr().err


def test_another_family_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert checked(monkeypatch, str(tmp_path)) == 1
    assert "models of type 'gpt2' are not supported" in capsys.readouterr().err


def test_a_window_longer_than_the_rows_is_said(folder: Path) -> None:
    result = check_model(str(folder), Cut(1, 1), length=12)
    assert result.equal
    assert "a window of 16 tokens; --length 32 checks beyond it" in result.note


def test_a_quantized_folder_is_compared_with_its_dequantized_model(tmp_path: Path) -> None:
    folder = save_vivid_model("llama", tmp_path)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            scales = torch.full([size // 16 for size in weight.shape], 0.01)
            stored |= {name: (weight / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(settings))
    assert check_model(str(folder)).equal


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "partial_rotary_factor": 1.0,
}


@pytest.mark.parametrize("length", [20, 60])
@pytest.mark.parametrize(
    ("family", "rope"),
    [("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), ("llama", LONGROPE), ("phi3", LONGROPE)],
)
def test_rows_on_both_sides_of_a_rope_s_switch(family: str, rope: dict[str, Any], length: int, tmp_path: Path) -> None:
    """The uncut model takes the longest row's frequencies for all of a batch: it is asked for each row alone."""
    context = 24 if rope["rope_type"] == "dynamic" else 96
    settings = {"rope_parameters": rope, "max_position_embeddings": context, "original_max_position_embeddings": 24}
    result = check_model(str(save_vivid_model(family, tmp_path, **settings)), Cut(1, 2), length)
    assert result.equal, result.verdict


def test_the_verdict_says_how_long_rows_were(tmp_path: Path) -> None:
    folder = str(save_vivid_model("llama", tmp_path, blocks=3, max_position_embeddings=40))
    assert "rows of up to 24 tokens" in check_model(folder, length=600).verdict
    assert "rows of up to 2 tokens" in check_model(folder, length=1).verdict


def test_a_context_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    folder = save_vivid_model("llama", tmp_path, blocks=3, max_position_embeddings=17)
    with pytest.raises(ModelError, match="context of 17 tokens is too short"):
        check_model(str(folder))
