from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.errors import RunError
from isthmus.gateway import extra


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["gateway", str(tmp_path)], standalone_mode=False)
    assert isinstance(found.exception, RunError)
    assert str(tmp_path) in found.exception.message


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "SERVER_PACKAGES", ("absent_server",))
    found = CliRunner().invoke(app, ["gateway", str(tmp_path)], standalone_mode=False)
    assert isinstance(found.exception, RunError)
    assert "isthmus[gateway]" in found.exception.remedy
