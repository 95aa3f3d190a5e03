"""Names: no public name means two things in two modules of the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import isthmus

SOURCE = Path(isthmus.__file__).parent
SHARED = {
    "Answer": "an emulator's target; a request's future answer",
    "CHUNK": "rows or values processed at a time",
    "COLUMNS": "a table's head; columns of a matrix processed at a time",
    "Channel": "an attacked channel; a connection to a service",
    "Contribution": "an update that an adversary sees; one that the root aggregates",
    "Control": "SCAFFOLD's control at the root and in a silo",
    "EXACT": "tolerances of attacks",
    "FLOOR": "smallest values of scores and weights",
    "Guard": "a protocol and its implementation",
    "HELD_OUT": "shares and counts of held-out rows",
    "History": "contributions that a rule remembers; tokens that crossed",
    "KEYS": "keys of recipe sections",
    "Momentum": "a server optimizer; its recipe section",
    "NAME": "names of result files",
    "NAMES": "names of parts; names of tensors",
    "POLL_SECONDS": "intervals of two loops",
    "POOL": "sizes of candidate pools",
    "PIECE": "values processed at a time",
    "Pair": "a sentence pair; a pair of shares",
    "ROUNDING": "tolerances of an attack and of a rule",
    "ROWS": "row counts of the demo, of a distillation, of a table",
    "Row": "rows of results, canaries, data",
    "Scores": "scores of an attack; of the demo",
    "Shield": "a protocol and its implementation",
    "Span": "a subspace; characters with a class",
    "Tensors": "tensors by name, as a mapping or a dictionary",
    "TINY": "smallest divisors",
    "Tokens": "tokens found by an attack; a tokenized row",
    "UNSEEN": "scores of tokens without data",
    "Whole": "an uncut model; integers of a ring",
    "agreement": "of labels; of updates",
    "answered": "an attack's answer; a finished future",
    "attack": "a run's attack and its command",
    "control_of": "SCAFFOLD's control at the root and in a silo",
    "export": "a command and what it calls",
    "join": "a silo joins; shares are joined",
    "updates_of": "a silo's updates; those that an adversary sees",
    "opened": "a run opened for an attack; for use",
}
"""Names that still stand in several modules, with their meanings there. The list may only become shorter."""


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
    ambiguous = {name for name, found in meanings.items() if len(found) > 1}
    assert ambiguous <= SHARED.keys(), f"rename in one of the modules: {sorted(ambiguous - SHARED.keys())}"


def test_equal_aliases_are_one_meaning_and_classes_are_not(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for path in (one, other):
        path.write_text("A = dict[str, int]\n_B = 1\nclass C: ...\n")
    assert definitions(one)["A"] == definitions(other)["A"]
    assert definitions(one)["C"] != definitions(other)["C"]
    assert "_B" not in definitions(one)
