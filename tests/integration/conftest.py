"""What tests of real processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import Commands


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Starts commands of isthmus; what still runs at the test's end is ended."""
    started = Commands(tmp_path)
    yield started
    started.end()
