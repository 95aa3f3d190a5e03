"""Letters over a socket."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines.flower.courier.letters import SOCKET_MODE, Letter, Postbox, ask, read, written

HEADS = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()))


@given(HEADS, st.lists(st.binary(max_size=100), max_size=4))
def test_a_letter_is_read_as_it_was_written(head: dict[str, object], bodies: list[bytes]) -> None:
    letter = Letter(head, tuple(bodies))
    assert read(written(letter)) == letter


@pytest.mark.parametrize("data", [b"", b"{}", b"[{}, [1]]\n", b"[{}, [0]]\nx", b"[1, []]\n"])
def test_what_is_no_letter_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # JSON's own, too
        read(data)


def test_letters_are_answered_each_in_its_turn(tmp_path: Path) -> None:
    with Postbox(tmp_path / "box", lambda letter: Letter({"n": letter.head["n"] + 1}, letter.bodies)):
        assert stat.S_IMODE((tmp_path / "box").stat().st_mode) == SOCKET_MODE
        for n, body in enumerate((b"", b"x", bytes(2**21))):
            assert ask(tmp_path / "box", Letter({"n": n}, (body,))) == Letter({"n": n + 1}, (body,))
    assert not (tmp_path / "box").exists()


def test_an_answer_under_way_is_given_before_the_postbox_closes(tmp_path: Path) -> None:
    asked, answers = threading.Event(), list[Letter]()

    def slow(letter: Letter) -> Letter:
        asked.set()
        time.sleep(0.3)
        return letter

    with Postbox(tmp_path / "box", slow):
        thread = threading.Thread(target=lambda: answers.append(ask(tmp_path / "box", Letter({"n": 1}))))
        thread.start()
        asked.wait(10)
    thread.join(10)
    assert answers == [Letter({"n": 1})]


def test_who_is_early_waits_and_the_impatient_do_not(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        ask(tmp_path / "box", Letter({}))
    answers: list[Letter] = []
    thread = threading.Thread(target=lambda: answers.append(ask(tmp_path / "box", Letter({}), patience=10)))
    thread.start()
    with Postbox(tmp_path / "box", lambda letter: Letter({"there": True})):
        thread.join(10)
    assert answers == [Letter({"there": True})]


def test_a_letter_that_a_failing_process_did_not_answer_is_given_again(tmp_path: Path) -> None:
    tries: list[Letter] = []

    def failing_once(letter: Letter) -> Letter:
        tries.append(letter)
        if len(tries) == 1:
            raise OSError
        return letter

    with Postbox(tmp_path / "box", failing_once):
        assert ask(tmp_path / "box", Letter({"n": 1}), patience=10) == Letter({"n": 1})
    assert len(tries) == 2


def test_a_socket_that_an_ended_process_left_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    with Postbox(tmp_path / "box", lambda letter: letter), pytest.raises(FileExistsError, match="another process"):
        Postbox(tmp_path / "box", lambda letter: letter)
    left = Postbox(tmp_path / "box", lambda letter: letter)
    left.server_close()
    with Postbox(tmp_path / "box", lambda letter: letter):
        assert ask(tmp_path / "box", Letter({})) == Letter({})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is no socket"):
        Postbox(tmp_path / "file", lambda letter: letter)
    assert (tmp_path / "file").read_text() == "mine"
