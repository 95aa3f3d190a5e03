"""The documents are short, complete and true: sizes, links, modules and paths that they name."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from isthmus.recipe import Recipe
from isthmus.recipe.section import Section

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src" / "isthmus"
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES, ROOT / "benchmarks" / "RESULTS.md"]
MAP = [ROOT / "docs" / "architecture.md", *sorted((ROOT / "docs" / "features").glob("*.md"))]
"""Where every module has to be named."""

LONGEST_LINE = 120
README_LINES = 150
GENERATED = re.compile(r"_pb2$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"([a-z0-9_]+(?:/[a-z0-9_]+)+)(?:\.([A-Za-z_]+)[\w.]*(?:\(.*\))?)?")
"""``room/file`` or ``room/file.name``."""
PLACES = ("tests", "benchmarks", "recipes", "docs", "src")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= README_LINES


@each_document
def test_prose_is_narrow(path: Path) -> None:
    wide = [f"{number}: {line[:60]}…" for number, line in prose(text_of(path)) if len(line) > LONGEST_LINE]
    assert not wide


@each_document
def test_every_link_leads_somewhere(path: Path) -> None:
    broken = []
    for target in LINK.findall(text_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        page = path.parent / place if place else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(target)
    assert not broken


@each_document
def test_every_path_exists(path: Path) -> None:
    """In backticks: modules as ``room/file``, with or without a name in them, and files of the repository."""
    assert not [code for code in CODE.findall(text_of(path)) if is_missing(code)]


def test_every_target_that_is_named_can_be_made() -> None:
    rules = subprocess.run(["make", "-npq"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    targets = set(re.findall(r"^([\w-]+):", rules, re.MULTILINE))
    texts = [*DOCUMENTS, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "benchmarks" / "results").glob("*.json")]
    written = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    named = set(re.findall(r"\bmake (bench-[a-z]+(?:-[a-z]+)*)", written))
    assert len(named) > 20
    assert named <= targets, named - targets


def test_every_module_is_named() -> None:
    named = {match[1] for page in MAP for code in CODE.findall(text_of(page)) if (match := MODULE.fullmatch(code))}
    assert modules() - named - {"errors", "isthmus"} == set()


@each_document
def test_every_key_exists(path: Path) -> None:
    """In backticks: keys of a recipe as ``table.key``."""
    assert not [code for code in CODE.findall(text_of(path)) if is_unknown_key(code)]


def test_every_room_is_in_the_table_of_rooms() -> None:
    table = re.search(r"\| room \| holds .+?\n\n", text_of(ROOT / "docs" / "architecture.md"), flags=re.DOTALL)
    assert table is not None
    lines = table[0].strip().splitlines()
    listed = {room for line in lines for room in CODE.findall(line.split("|")[1])}
    assert listed == {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} | {"errors"}


def test_every_feature_is_listed() -> None:
    """The architecture links each page of ``docs/features``."""
    linked = set(LINK.findall(text_of(ROOT / "docs" / "architecture.md")))
    assert {f"features/{page.name}" for page in (ROOT / "docs" / "features").glob("*.md")} <= linked


def test_readme_shows_the_minimal_recipe() -> None:
    (shown,) = re.findall(r"```toml\n(.+?)```", text_of(README), flags=re.DOTALL)
    assert shown.strip() == text_of(ROOT / "recipes" / "minimal.toml").strip()


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("silo/boundary", False),
        ("silo/boundary.Boundary", False),
        ("silo/boundary.Absent", True),
        ("silo/absent", True),
        ("silo/drafting", False),
        ("tests/oracle", False),
        ("tests/oracle/test_no_*.py", True),
        ("north/train.jsonl", False),
        ("and/or", False),
    ],
)
def test_a_missing_path_is_noticed(code: str, missing: bool) -> None:
    assert is_missing(code) == missing


def test_what_counts_as_prose() -> None:
    text = "a\n\n```toml\ncode\n```\n\n    code\n\n- item\n  more of it\n\n| cell |\n[a](b) · [c](d)\n<!-- note -->\n"
    assert [line for _, line in prose(text)] == ["a", "- item", "  more of it"]


@pytest.mark.parametrize(
    ("code", "unknown"),
    [
        ("train.rounds", False),
        ("boundary.forward", False),
        ("boundary.forward.clip", False),
        ("sensitivity.classes", False),
        ("silo.steps", False),
        ("train.laps", True),
        ("boundary.forward.clap", True),
        ('federation.lora = "svd"', False),
        ("recipe.toml", False),
        ("privacy_table.py", False),
    ],
)
def test_an_unknown_key_is_noticed(code: str, unknown: bool) -> None:
    assert is_unknown_key(code) == unknown


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def modules() -> set[str]:
    """Every module of the package as ``room/file``, but packages, entry points and generated code."""
    names = (path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))
    return {name for name in names if not GENERATED.search(name) and not name.rpartition("/")[2].startswith("__")}


def prose(text: str) -> list[tuple[int, str]]:
    """The numbered lines that people read as sentences: no code, tables, comments, or lines of links alone."""
    found, fenced, before = [], False, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.strip():
            code = line.startswith("    ") and (not before or before.startswith("    "))
            links = LINK.search(line) and not re.search(r"\w", LINK.sub("", line))
            if not (code or links or line.lstrip().startswith(("|", "<!--", "!["))):
                found.append((number, line))
        before = line
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_missing(code: str) -> bool:
    """Whether this looks like a module or a file of the repository, and is none."""
    if code.split("/")[0] in PLACES and "/" in code and " " not in code:
        return not any(ROOT.glob(code.rstrip("/")))
    match = MODULE.fullmatch(code)
    if match is None or not (SOURCE / match[1].split("/")[0]).is_dir():
        return False
    path, name = SOURCE / match[1], match[2]
    if not path.with_suffix(".py").exists():
        return not path.is_dir() or name is not None
    return name is not None and not re.search(rf"\b{name}\b", text_of(path.with_suffix(".py")))


def is_unknown_key(code: str) -> bool:
    """Whether this looks like a key of a recipe, with or without a value, and is none."""
    first, *others = code.partition(" = ")[0].split(".")
    if first not in Recipe.model_fields or not others or not all(re.fullmatch(r"[a-z_]+", one) for one in others):
        return False
    table = tables_in(Recipe.model_fields[first].annotation)
    for name in others:
        fields = [one.model_fields[name] for one in table if name in one.model_fields]
        if not fields:
            return True
        table = [one for field in fields for one in tables_in(field.annotation)]
    return False


def tables_in(annotation: Any) -> list[type[Section]]:
    """The tables that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [table for argument in get_args(annotation) for table in tables_in(argument)]
