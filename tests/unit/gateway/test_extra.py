"""Without the extra the gateway says what to install."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from isthmus.errors import RunError
from isthmus.gateway import extra


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extra.require_server()
    monkeypatch.setattr(extra, "SERVER_PACKAGES", ("starlette", "absent_server"))
    with pytest.raises(RunError, match="absent_server") as found:
        extra.require_server()
    assert "isthmus[gateway]" in found.value.remedy
    assert "starlette" not in found.value.message


def test_the_packages_are_those_of_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    listed = {one.partition(">")[0] for one in project["optional-dependencies"]["gateway"]}
    assert set(extra.SERVER_PACKAGES) <= listed


def test_a_conversation_needs_none_of_it() -> None:
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in extra.SERVER_PACKAGES)
    code = f"import sys; {hidden}import isthmus.gateway.chat, isthmus.gateway.batcher, isthmus.cli.main"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
