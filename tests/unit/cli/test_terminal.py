"""The command at terminals of other encodings, with arguments that are no text, and into pipes that are closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.cli import terminal
from isthmus.cli.terminal import as_utf8, check_arguments, encoding_error
from isthmus.errors import IsthmusError

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""An environment in which Python takes the terminal and file names for ASCII."""


def isthmus(*arguments: bytes, stdout: int = subprocess.PIPE, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command in a process of its own."""
    command = [os.fsencode(sys.executable), b"-m", b"isthmus", *arguments]
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment}, check=False
    )
    return done.returncode, (done.stdout or b"").decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1"}, ASCII], ids=str)
def test_a_terminal_without_the_characters_gets_others(tmp_path: Path, environment: dict[str, str]) -> None:
    code, out, err = isthmus(b"certificates", os.fsencode(tmp_path / "Zürich–東京.toml"), **environment)
    assert (code, out) == (1, "")
    assert "error: cannot read the recipe" in err
    assert "remedy: check the path" in err
    code, out, err = isthmus(b"generate", b"--help", **environment)
    assert (code, err) == (0, "")
    assert "Answer a prompt" in out


@pytest.mark.parametrize("environment", [{}, ASCII], ids=str)
def test_an_argument_that_is_no_text_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    code, out, err = isthmus(b"generate", os.fsencode(tmp_path), b"caf\xe9", **environment)
    assert (code, out) == (1, "")
    assert err.startswith("error: the argument 'caf")
    assert "is not UTF-8 text\n  remedy: set the terminal to UTF-8" in err


def test_a_pipe_that_nobody_reads_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, _, err = isthmus(b"generate", b"--help", stdout=writing)
    os.close(writing)
    assert (code, err) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_named() -> None:
    with Path("/dev/full").open("wb") as full:
        code, _, err = isthmus(b"generate", b"--help", stdout=full.fileno())
    assert code == 1
    assert err == "error: cannot write the output: No space left on device\n"


def test_closed_outputs(tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m isthmus privacy "{tmp_path}" >&- 2>&-'
    assert subprocess.run(command, shell=True, check=False).returncode == 1


def test_prompts_of_an_ascii_terminal_are_read_as_utf_8() -> None:
    assert as_utf8("Zürich") == "Zürich"
    assert as_utf8("Z" + os.fsdecode("ü".encode()) + "rich") == "Zürich"
    escaped = "Z" + "ü".encode().decode("ascii", "surrogateescape") + "rich"
    assert as_utf8(escaped) == "Zürich"
    assert check_arguments([escaped, "a"]) == [escaped, "a"]
    with pytest.raises(IsthmusError, match="'caf�' is not UTF-8"):
        check_arguments(["a", "caf\udce9"])


def test_streams_that_are_not_there_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    terminal.prepare_output()
    print("to nobody")
    assert terminal.flush_output(0) == 0
    sys.stdout.close()


def test_what_an_encoding_cannot_write_is_said() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "東京.toml".encode("ascii")
    assert encoding_error(caught.value).message == "東京 cannot be written in the encoding ascii"
