"""The silo's end, letter by letter; as a channel it is in ``tests/conformance``, in rounds in ``tests/features``."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from isthmus.engines.flower.courier.letters import Letter, ask
from isthmus.engines.flower.silo_end import FlowerChannel, at_socket, listening
from isthmus.errors import DataError, PeerGoneError, RoundLostError, RunError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, answered
from tests.conformance.test_channels import AUTHORITY, HANG, Echo, carried


@pytest.fixture
def channel() -> FlowerChannel:
    return FlowerChannel(AUTHORITY.issue("a"), pb.Ping())


def test_an_opening_letter_proposes_a_connection_and_disturbs_none(channel: FlowerChannel) -> None:
    first, second = (channel.exchange(Letter({"hold": 0.0}, (b"",))) for _ in range(2))
    assert first.head["session"] != second.head["session"]
    assert (first.head["number"], first.head["awaits"]) == (0, [0])
    with carried(Echo(), "a") as open_channel:
        answer = open_channel.submit(pb.Ping())
        open_channel.exchange(Letter({"hold": 0.0}, (b"",)))
        assert answer.result(HANG) == pb.Pong()


def test_a_letter_for_another_silo_is_refused(channel: FlowerChannel) -> None:
    answer = channel.exchange(Letter({"silo": "b", "hold": 0.0}, (b"",)))
    assert answer.head["refused"] == "the worker at this socket is a's"
    assert answer.head["number"] == -1


def test_an_update_goes_with_the_next_request_and_a_lost_round_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    def how(request: object) -> Answer:
        if isinstance(request, pb.Update):
            raise RoundLostError("too late", remedy="ask again")
        return answered(pb.Plan(completed=7) if isinstance(request, pb.Ready) else pb.Pong())

    with carried(service := Echo(how), "a") as channel:
        assert channel.call(pb.Update(round=1, weight=1.0)) == pb.Accepted()
        assert channel.call(pb.Ready(completed=1)).completed == 7
    assert [type(one) for one in service.requests if not isinstance(one, pb.Ping)] == [pb.Update, pb.Ready]
    assert any("went on without this silo" in one for one in caplog.messages)


def test_another_error_of_an_update_is_raised_with_the_next_answer() -> None:
    def how(request: object) -> Answer:
        if isinstance(request, pb.Update):
            raise DataError("no such tensor", remedy="send others")
        return answered(pb.Plan() if isinstance(request, pb.Ready) else pb.Pong())

    with carried(Echo(how), "a") as channel:
        channel.call(pb.Update(round=1, weight=1.0))
        with pytest.raises(DataError, match="no such tensor"):
            channel.call(pb.Ready())


def test_the_last_word_says_how_the_silo_ended(tmp_path: Path) -> None:
    channel = FlowerChannel(AUTHORITY.issue("a"), pb.Ping())
    words: list[Letter] = []

    def fail() -> None:
        with at_socket(channel, tmp_path / "box"):
            channel.exchange(Letter({"hold": 0.0}, (b"",)))
            channel.close()  # as whoever holds it does first
            raise DataError("row 3 of patient Smith", remedy="correct it")

    def listen() -> None:
        while not words or not words[-1].head.get("over"):
            words.append(ask(tmp_path / "box", Letter({"hold": 1.0}, (b"",)), patience=HANG))

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(DataError):
        fail()
    thread.join(HANG)
    assert words[-1].head["failure"] == "DataError; its log says more"


def test_a_closed_channel_refuses_and_fails_what_is_pending(channel: FlowerChannel) -> None:
    pending = channel.submit(pb.Ping())
    channel.close()
    for failed in (lambda: channel.submit(pb.Ping()), lambda: pending.result(HANG)):
        with pytest.raises(PeerGoneError):
            failed()


def test_a_path_that_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="cannot listen") as refused,
        listening(tmp_path / ("x" * 200), lambda letter: letter),
    ):
        pass
    assert "100 characters" in refused.value.remedy
