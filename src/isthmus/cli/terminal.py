"""The terminal: output in whatever encoding it has, arguments that are not UTF-8, a closed pipe."""

from __future__ import annotations

import errno
import io
import os
import sys

from isthmus.errors import IsthmusError

_REMEDY = "set the terminal to UTF-8 (LC_ALL=C.UTF-8), or use names and texts that its encoding has"


def prepare_output() -> None:
    """Let no character that standard output or standard error cannot write end the command: it becomes "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_output(code: int) -> int:
    """Write what standard output still holds; returns the exit code, which becomes 1 if that fails.

    A pipe whose reader has gone is no error to speak of: ``isthmus privacy RUN | head``.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE and not code:
            print(f"error: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at its end
        return code or 1
    return code


def check_arguments(arguments: list[str]) -> list[str]:
    """The arguments themselves, if they are text. Bytes that the terminal's encoding does not have may be UTF-8.

    Raises:
        IsthmusError: one is neither.
    """
    for argument in arguments:
        as_utf8(argument)
    return arguments


def as_utf8(argument: str) -> str:
    """An argument's text, read as UTF-8 where the terminal's encoding does not have it.

    Raises:
        IsthmusError: it is not UTF-8 either.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:  # Python keeps bytes that it cannot decode as surrogates
        try:
            return os.fsencode(argument).decode()
        except UnicodeError:
            shown = os.fsencode(argument).decode(errors="replace")
            raise IsthmusError(f"the argument {shown!r} is not UTF-8 text", remedy=_REMEDY) from None
    return argument


def encoding_error(error: UnicodeEncodeError) -> IsthmusError:
    """The error of a name or text that cannot be written in this process's encoding."""
    text = error.object[error.start : error.end].encode(errors="backslashreplace").decode()
    return IsthmusError(f"{text} cannot be written in the encoding {error.encoding}", remedy=_REMEDY)
