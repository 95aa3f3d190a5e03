"""The log on standard error: for people, and as JSON lines for deployed roles."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from isthmus.cli.log import FORMAT
from isthmus.engines.lifetime import ENGINE

PREPARE = "import logging; from isthmus.cli.log import log_as, prepare_log; prepare_log(); prepare_log()\n"
LOG = "log = logging.getLogger('isthmus.federation.rounds')\nlog.info('root: %s', 'gathering', extra={'round': 3})\n"
TEXT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} INFO: root: gathering\n"


def logged(code: str, **environment: str) -> str:
    """What this code writes to standard error, which is no terminal, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in (FORMAT, ENGINE)}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code], capture_output=True, text=True, check=True, env=clean | environment
    )
    return done.stderr


def test_the_log_has_times() -> None:
    assert re.fullmatch(TEXT, logged(LOG))


@pytest.mark.parametrize("environment", [{}, {FORMAT: "json"}], ids=str)
def test_a_deployed_role_writes_one_object_a_line(environment: dict[str, str]) -> None:
    lines = logged("log_as('silo north')\n" + LOG + LOG, **environment).splitlines()
    first, second = map(json.loads, lines)
    assert first["time"] <= second.pop("time")
    assert second == {"level": "info", "role": "silo north", "event": "root: gathering", "fields": {"round": 3}}


def test_text_where_it_is_asked_for() -> None:
    assert re.fullmatch(TEXT, logged("log_as('root')\n" + LOG, **{FORMAT: "text"}))


def test_a_child_of_the_engine_writes_text_unless_asked() -> None:
    code = "from isthmus.engines import lifetime; lifetime._Engine.started = True; log_as('root')\n" + LOG
    assert re.fullmatch(TEXT, logged(code))
    assert json.loads(logged(code, **{FORMAT: "json"}))["role"] == "root"


def test_another_format_is_refused() -> None:
    code = "from isthmus.errors import IsthmusError\ntry:\n log_as('root')\nexcept IsthmusError as error: print(error)"
    clean = {**os.environ, FORMAT: "xml"}
    done = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout == f"{FORMAT} is 'xml'\n  remedy: set {FORMAT} to json or text, or unset it\n"


def test_the_message_of_an_unexpected_error_is_not_written_as_json() -> None:
    code = "log_as('trunk')\ntry:\n int('canary')\nexcept ValueError as error:\n"
    code += " logging.getLogger('isthmus').error('answering failed', exc_info=error)"
    written = logged(code)
    assert "canary" not in written
    fields = json.loads(written)["fields"]
    assert fields["error"] == "ValueError"
    assert fields["places"] == ["<string>:4"]
