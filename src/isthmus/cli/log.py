"""The log on standard error: lines for people, or a JSON object a line for what collects logs of deployed roles."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

from isthmus.engines.lifetime import by_engine
from isthmus.errors import IsthmusError

FORMAT = "ISTHMUS_LOG"
"""Environment variable: ``json`` or ``text``."""
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _StandardError(logging.Handler):
    """Writes to what is standard error at that time, which a caller in this process may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class JsonLines(logging.Formatter):
    """One object a record: ``time`` (UTC), ``level``, ``role``, ``event`` and, if there are any, ``fields``.

    Of an unexpected error the class and the places in the code are written, not its message, which may quote data.

    Args:
        role: what this process is, such as ``silo north``.
    """

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "event": record.getMessage(),
        }
        fields = {name: value for name, value in vars(record).items() if name not in _KNOWN}
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = record.exc_info[0].__name__
            places = traceback.extract_tb(record.exc_info[2])
            fields["places"] = [f"{place.filename}:{place.lineno}" for place in places]
        if fields:
            line["fields"] = fields
        return json.dumps(line, default=str)


def prepare_log() -> None:
    """Show isthmus's log on standard error, from state changes up, each line with its time and time zone."""
    log = logging.getLogger("isthmus")
    if not log.handlers:
        log.addHandler(_StandardError())
    text = logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S %z")
    _own_handler(log).setFormatter(text)
    log.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns, as PEFT imports it, of a spare kernel


def log_as(role: str) -> None:
    """Log as this role: JSON lines where ``ISTHMUS_LOG`` is ``json``, or is not set, standard error is no terminal, and
    no engine started the process.

    Raises:
        IsthmusError: ``ISTHMUS_LOG`` is something else.
    """
    if _is_json():
        _own_handler(logging.getLogger("isthmus")).setFormatter(JsonLines(role))


def _is_json() -> bool:
    chosen = os.environ.get(FORMAT, "")
    if chosen not in ("", "json", "text"):
        raise IsthmusError(f"{FORMAT} is {chosen[:32]!r}", remedy=f"set {FORMAT} to json or text, or unset it")
    return chosen == "json" or (not chosen and not by_engine() and not sys.stderr.isatty())


def _own_handler(log: logging.Logger) -> logging.Handler:
    own = (handler for handler in log.handlers if isinstance(handler, _StandardError))
    return next(own, logging.NullHandler())  # another program's handlers stay as they are
