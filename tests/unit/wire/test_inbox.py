"""What is held for a peer, without a network: each id handled once, what is freed when, and who waits for whom."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from google.protobuf.message import Message

from isthmus.errors import FrameError, ProtocolError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from isthmus.wire.inbox import COST, KEPT, LEAST, MAX_INSTANCES, VISITOR, Inbox, PeerAccount, Stream
from tests.conformance.test_channels import HANG, Echo, Late, echoed, number, until

LIMIT = LEAST // 4


def account(service: Echo | None = None, grace: float = HANG) -> PeerAccount:
    return PeerAccount(service or Echo(), "a", LIMIT, grace)


def connected(one: PeerAccount, instance: str = "i") -> tuple[Inbox, Stream]:
    stream = Stream(lambda: None)
    return one.connect(instance, stream)[0], stream


def request(id: int, *, acked: int = 0, size: int = 0) -> bytes:
    body = pb.Gradient(gradient=pb.Matrix(data=bytes(size))) if size else number(id)
    return frames.wrap(body, id=id, acked=acked).SerializeToString()


def sent(inbox: Inbox, stream: Stream) -> list[int]:
    """Ids of all that can be sent now; it is taken."""
    stream.ended, ids = True, []
    while (data := inbox.next(stream)) is not None:
        ids.append(frames.parse(data).id)
    stream.ended = False
    return ids


def test_an_id_is_answered_once_and_freed_when_acknowledged() -> None:
    service = Echo()
    one = account(service)
    inbox, stream = connected(one)
    for id, acked in [(1, 0), (1, 0), (2, 0)]:
        inbox.receive(request(id, acked=acked), stream)
    assert sent(inbox, stream) == [1, 2]
    inbox.receive(request(1), stream)
    inbox.receive(request(3, acked=2), stream)
    for id in (1, 2, 3):
        inbox.receive(request(id), stream)
    assert sent(inbox, stream) == [3], "the client has 1 and 2, by its own word"
    assert service.requests == [number(1), number(2), number(3)]
    inbox.receive(request(3, acked=3), stream)
    assert one.held == 0


def test_two_streams_never_handle_an_id_twice() -> None:
    service = Echo()
    one = account(service)
    for _ in range(3):
        inbox, stream = connected(one)
        for id in range(1, 101):
            inbox.receive(request(id), stream)
        assert sent(inbox, stream) == [*range(1, 101)]
    assert service.requests == list(map(number, range(1, 101)))


def test_a_greeting_is_answered_anew_and_goes_first() -> None:
    service = Echo()
    inbox, stream = connected(account(service))
    for _ in range(2):
        inbox.receive(request(1), stream)
        inbox.receive(request(0), stream)
        assert sent(inbox, stream)[0] == 0
    assert service.requests == [number(1), number(0), number(0)]


def test_a_second_greeting_waits_until_the_first_is_sent() -> None:
    service = Echo()
    inbox, stream = connected(account(service))
    inbox.receive(request(0), stream)
    with ThreadPoolExecutor(1) as thread:
        second = thread.submit(inbox.receive, request(0), stream)
        assert not second.done()
        assert inbox.next(stream) is not None
        second.result(HANG)
        assert inbox.next(stream) is not None
    assert len(service.requests) == 2


@pytest.mark.parametrize("seed", range(20))
def test_held_is_what_is_open_unsent_and_kept(seed: int) -> None:
    """Random requests, answers and acknowledgements; the oracle adds up frames by id."""
    rng, service = random.Random(seed), Late()
    one = account(service)
    inbox, stream = connected(one)
    held: dict[int, int] = {}
    under_way: list[tuple[int, Message, Answer]] = []
    last = acked = 0
    for _ in range(200):
        step = rng.choice(["ask", "answer", "send", "acknowledge"])
        if step == "answer" and under_way:
            id, body, answer = under_way.pop(rng.randrange(len(under_way)))
            answer.set_result(body)
            held[id] = frames.wrap(body, id=id).ByteSize() + COST
        elif step == "send":
            sent(inbox, stream)
        elif len(under_way) < 20:
            last += rng.choice([1, 1, 5])
            if step == "acknowledge":
                acked = min([last, *(id for id, _, _ in under_way)]) - 1
            data = request(last, acked=acked, size=rng.choice([0, 10, 5000]))
            inbox.receive(data, stream)
            under_way.append((last, *service.held.pop()))
            held = {id: size for id, size in held.items() if id > acked} | {last: len(data) + COST}
        assert one.held == sum(held.values())


def test_the_last_answers_sent_are_kept() -> None:
    one = account()
    inbox, stream = connected(one)
    for id in range(1, 9):
        inbox.receive(request(id, size=LIMIT - 2 * COST), stream)
        assert sent(inbox, stream) == [id]
    assert 2 * LIMIT < one.held <= KEPT * LEAST
    inbox, stream = connected(one)
    for id in (1, 8):
        inbox.receive(request(id), stream)
    answers = [frames.parse(inbox.next(stream) or b"") for _ in range(2)]
    assert [answer.WhichOneof("body") for answer in answers] == ["failure", "gradient"]
    assert isinstance(frames.reported_error(answers[0].failure), ProtocolError)


def test_requests_wait_for_room_and_one_has_it_always() -> None:
    service = Late()
    inbox, stream = connected(account(service))
    inbox.receive(request(1, size=3 * LIMIT), stream)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(inbox.receive, request(2, size=2 * LIMIT), stream)
        assert len(service.held) == 1
        service.answer()
        assert not waiting.done(), "the answer is not sent"
        assert sent(inbox, stream) == [1]
        waiting.result(HANG)
    assert len(service.held) == 1


def test_whoever_waits_for_room_ends_with_its_stream() -> None:
    service = Late()
    one = account(service)
    inbox, stream = connected(one)
    inbox.receive(request(1, size=3 * LIMIT), stream)
    waiting = threading.Thread(target=inbox.receive, args=(request(2, size=3 * LIMIT), stream))
    waiting.start()
    again, successor = connected(one)
    waiting.join(HANG)
    assert not waiting.is_alive()
    assert inbox.next(stream) is None
    assert again is inbox
    assert len(service.held) == 1
    service.answer()
    again.receive(request(1), successor)
    again.receive(request(2, acked=1, size=3 * LIMIT), successor)
    assert len(service.held) == 1


def test_answers_are_freed_once_a_client_is_gone_for_too_long() -> None:
    service = Late()
    one = account(service, grace=0.01)
    inbox, stream = connected(one)
    for id in (1, 2):
        inbox.receive(request(id, size=1000), stream)
    service.held.pop(0)[1].set_result(number(1))
    inbox.leave(stream)
    until(lambda: one.held == len(request(2, size=1000)) + COST)
    service.answer()
    assert one.held == 0, "an answer that comes later is not kept, either"
    inbox, stream = connected(one)
    for id in (1, 2, 3):
        inbox.receive(request(id), stream)
    assert [frames.parse(inbox.next(stream) or b"").WhichOneof("body") for _ in range(2)] == ["failure"] * 2
    service.answer()
    assert sent(inbox, stream) == [3]


def test_a_client_that_is_back_in_time_loses_nothing() -> None:
    one = account(grace=HANG)
    inbox, stream = connected(one)
    inbox.receive(request(1), stream)
    inbox.leave(stream)
    inbox, stream = connected(one)
    inbox.receive(request(1), stream)
    assert sent(inbox, stream) == [1]


def test_clients_beyond_the_allowed_make_room_for_good() -> None:
    one = account()
    streams = [connected(one, f"i{number}")[1] for number in range(MAX_INSTANCES + 1)]
    assert [stream.replaced for stream in streams] == [True, *[False] * MAX_INSTANCES]
    with pytest.raises(ProtocolError, match="newer processes of a") as refused:
        connected(one, "i0")
    assert refused.value.remedy
    assert not any(stream.replaced for stream in streams[1:])


def test_visitors_take_nothing_of_a_client_that_is_away() -> None:
    """A doctor that looks again and again while the silo's connection is broken."""
    one = account(grace=HANG)
    inbox, stream = connected(one)
    inbox.receive(request(1), stream)
    inbox.leave(stream)
    for number_ in range(3 * MAX_INSTANCES):
        visitor, passing = connected(one, f"{VISITOR}{number_}")
        visitor.receive(request(7), passing)
        assert sent(visitor, passing) == [7]
        if number_ % 2:
            visitor.leave(passing)
    again, successor = connected(one)
    assert again is inbox
    again.receive(request(1), successor)
    assert sent(again, successor) == [1]
    newer = [connected(one, f"i{number_}")[1] for number_ in range(MAX_INSTANCES - 1)]
    connected(one, f"{VISITOR}last")
    assert not any(one.replaced for one in (successor, *newer))


def test_a_client_without_a_stream_makes_room_before_an_older_one() -> None:
    one = account()
    lasting = connected(one, "lasting")[1]
    for number_ in range(5):
        inbox, stream = connected(one, f"i{number_}")
        inbox.leave(stream)
    assert not lasting.replaced


def test_requests_of_processes_that_are_gone_expect_no_answers() -> None:
    """A silo that starts again and again while its root waits for others is heard each time."""
    service = Late()
    one = account(service)
    one.learn("adapters", 1, bytes(LIMIT))
    for number_ in range(20):
        inbox, stream = connected(one, f"i{number_}")
        inbox.receive(request(1), stream)
        inbox.leave(stream)
    assert len(service.held) == 20
    service.answer()
    assert (one.open, one.expected) == (0, 0)


def test_no_lock_is_held_while_a_service_handles() -> None:
    """A request of one peer may settle those of others, whose answers then arrive in the same thread."""
    accounts: list[PeerAccount] = []
    waiting: list[Answer] = []

    def how(body: Message) -> Answer:
        if body == number(1):
            waiting.append(Answer())
            return waiting[-1]
        held = [threading.Thread(target=lambda one=one: one.held) for one in accounts]
        for thread in held:
            thread.start()
            thread.join(HANG)
            assert not thread.is_alive()
        for answer in waiting:
            answer.set_result(body)
        return echoed(body)

    accounts += [PeerAccount(Echo(how), peer, LIMIT, HANG) for peer in ("a", "b")]
    ends = [connected(one) for one in accounts]
    ends[0][0].receive(request(1), ends[0][1])
    ends[1][0].receive(request(2), ends[1][1])
    assert [sent(*end) for end in ends] == [[1], [2]]


def test_bytes_that_are_no_frame() -> None:
    inbox, stream = connected(account())
    with pytest.raises(FrameError):
        inbox.receive(b"\xff rubbish", stream)
    inbox.receive(b"", stream)
    assert frames.parse(inbox.next(stream) or b"").HasField("failure")
