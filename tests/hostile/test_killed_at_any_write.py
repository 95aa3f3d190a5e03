"""SIGKILL before a write or a change of state: the role starts again, and the federation ends as if it had not been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
TIMES = 3
"""Kills of each role, evenly over its writes; ``benchmarks/federated/kills.py`` has one before each."""


@pytest.mark.parametrize(
    ("name", "roles"), [("plain", "trunk,root,north"), ("masked", "ward,west"), ("moved", "trunk,root,north")]
)
def test_a_role_that_is_killed_at_any_write_comes_back_and_the_result_is_the_same(
    name: str, roles: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.hostile.killed", name, roles, str(TIMES), str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
