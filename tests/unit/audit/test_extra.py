"""Without the extra ``audit`` the command says which packages are missing and how to install them."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from isthmus.audit.extra import PACKAGES, require_extra
from isthmus.errors import AttackError
from tests.integration.processes import call

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_the_extra_is_the_one_that_is_declared() -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["audit"]
    assert {re.split(r"[<>=]", one)[0] for one in declared} == set(PACKAGES.values())


def test_an_installed_extra_is_enough() -> None:
    require_extra()


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AttackError, match=f"not installed: {PACKAGES[module]}\n"):
        require_extra()


def test_the_command_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith(("isthmus.attacks", "isthmus.audit.attack"))]:
        monkeypatch.delitem(sys.modules, module)
    for module in PACKAGES:
        monkeypatch.setitem(sys.modules, module, None)
    refused = call(capsys, monkeypatch, "attack", str(tmp_path))
    assert refused.code == 1
    assert "attacks need packages that are not installed: rouge-score, sacrebleu, scipy, scikit-learn" in refused.err
    assert "remedy: install them with: pip install 'isthmus[audit]'" in refused.err
