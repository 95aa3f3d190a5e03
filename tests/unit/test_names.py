"""Names: no public name means two things in two modules of the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import isthmus

SOURCE = Path(isthmus.__file__).parent


def definitions(path: Path) -> dict[str, str]:
    """Public names that a module defines; for an assignment with its source, so that equal aliases are one meaning."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = str(path)
        elif isinstance(node, ast.Assign):
            found |= {target.id: ast.unparse(node.value) for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = str(path) if node.value is None else ast.unparse(node.value)
    return {name: meaning for name, meaning in found.items() if not name.startswith("_")}


def test_no_public_name_means_two_things() -> None:
    meanings: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "isthmus_pb2.py":
            for name, meaning in definitions(path).items():
                meanings[name].add(meaning)
    ambiguous = sorted(name for name, found in meanings.items() if len(found) > 1)
    assert not ambiguous, f"rename in one of the modules: {ambiguous}"


def test_equal_aliases_are_one_meaning_and_classes_are_not(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for path in (one, other):
        path.write_text("A = dict[str, int]\n_B = 1\nclass C: ...\n")
    assert definitions(one)["A"] == definitions(other)["A"]
    assert definitions(one)["C"] != definitions(other)["C"]
    assert "_B" not in definitions(one)
