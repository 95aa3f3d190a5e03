"""The package as users get it: built into a wheel, installed away from the repository, used with an empty home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import save_tiny_model, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, built from a copy: earlier builds leave files that were deleted since."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, folder / "copy" / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "copy")]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder / "site"


def isthmus(site: Path, home: Path, *arguments: str) -> str:
    """What the installed command prints, in this home."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "isthmus", *arguments], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_user_of_the_wheel_goes_from_files_to_answers(site: Path, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model", blocks=3)
    for name in ("north", "south"):
        rows = [{"text": f"w{20 + number} w21", "label": f"w{30 + number % 2}"} for number in range(8)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    assert isthmus(site, tmp_path, "--version").startswith("isthmus ")
    silos = ["--silo", "north=north.jsonl", "--silo", "south=south.jsonl", "--held-out", "south=north.jsonl"]
    isthmus(site, tmp_path, "init", "--model", "model", *silos, "--cut", "1,1")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"train.rounds = 2\n{recipe.read_text()}")
    assert "south" in isthmus(site, tmp_path, "data", "recipe.toml")
    assert "next: isthmus generate" in isthmus(site, tmp_path, "run", "recipe.toml", "--run-dir", "runs/first")
    assert "accuracy" in isthmus(site, tmp_path, "evaluate", "runs/first")


def test_every_shipped_recipe_and_file_is_in_the_wheel(site: Path) -> None:
    """All that the package has beside its modules in the repository."""
    package = ROOT / "src" / "isthmus"
    kept = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    kept |= {Path("recipes") / path.name for path in (ROOT / "recipes").glob("*.toml")}
    assert not kept - {path.relative_to(site / "isthmus") for path in (site / "isthmus").rglob("*")}
