"""What a run writes is what the docstring of ``RunDirectory`` lists, and so the architecture."""

from __future__ import annotations

import re
from pathlib import Path

from isthmus.storage.record import RunDirectory
from tests.integration.processes import run_here, write_federation

NAMES = re.compile(r"\b(PARTY|ROLE|SILO|NAME)\b")


def test_a_run_writes_the_files_that_are_listed(tmp_path: Path) -> None:
    recipe = write_federation(
        tmp_path / "made",
        train={"rounds": 1, "steps": 1},
        lora={"freeze_bottom": True},
        boundary={"release_once": True},
        sensitivity={"detectors": ["date"], "classes": {"high": {"noise": 2.0}}},
    )
    run_here(recipe, tmp_path / "run")
    written = {
        path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    patterns = [pattern_of(file) for file in listed_files(RunDirectory.__doc__ or "")]
    assert len(patterns) > 20
    assert not [file for file in written if not any(pattern.fullmatch(file) for pattern in patterns)]
    for one in ("trunk/kept/north", "root/rounds", "silos/north/released", "silos/south/records", "certificates/trunk"):
        assert any(file.startswith(f"{one}/") for file in written), one


def test_the_architecture_lists_the_same_files() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {pattern_of(file) for file in listed_files(page)} == {
        pattern_of(file) for file in listed_files(RunDirectory.__doc__ or "")
    }


def listed_files(text: str) -> list[str]:
    """The paths in a text's listing of a run directory. Folders end with a slash; ``a/b, c`` are two files of ``a``."""
    parts = re.split(r"\n```$|\n\s*\n", text, flags=re.MULTILINE)
    (listing,) = [part for part in parts if re.match(r"(```)?\s*recipe\.toml", part.strip())]
    files = []
    for line in listing.strip().removeprefix("```").strip().splitlines():
        first, *others = re.split(r"  +", line.strip())[0].split(", ")
        files += [first, *(f"{first.rpartition('/')[0]}/{other}" for other in others)]
    return files


def pattern_of(file: str) -> re.Pattern[str]:
    """Of the files that a listed path stands for."""
    pattern = NAMES.sub("[^/]+", re.escape(file)).replace("0003", r"\d{4}")
    return re.compile(f"{pattern}.+" if file.endswith("/") else pattern)
