"""The root's end of Flower: its service, answered to silos whose frames the Flower app brings."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cryptography import x509

from isthmus.engines.flower.app import check_carried
from isthmus.engines.flower.courier.letters import Letter
from isthmus.engines.flower.secured import Secured
from isthmus.engines.flower.silo_end import listening
from isthmus.errors import FrameError, IdentityError, IsthmusError
from isthmus.recipe import Recipe
from isthmus.recipe.tree import ROOT
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Service
from isthmus.wire.identity import Identity, common_name
from isthmus.wire.inbox import Inbox, PeerAccount, Stream
from isthmus.wire.server import MAX_INSTANCE
from isthmus.wire.vitals import Watched

AGAIN_SECONDS = 10.0
"""Time after which a node that failed, or was refused, is asked again."""
HEARD_SECONDS = 1.0
"""Time between two signs of life of a silo whose node is online."""
KEEP_SECONDS = 86_400.0
"""Time for which answers are kept for a silo that is away."""
NEWS_SECONDS = 0.2
"""Longest time between two looks for what is due."""
log = logging.getLogger(__name__)


class WatchedService(Service, Watched, Protocol):
    """A root behind its door."""


@dataclass
class _Caller:
    """One node of Flower, and the connection of the silo behind it."""

    node: int
    claimed: str = ""
    """The silo that the node says it is."""
    silo: str = ""
    """The silo that it is, by certificate; empty: it has shown none yet."""
    session: str = ""
    number: int = 0
    """Of the last letter to the silo in this session."""
    body: bytes = b""
    """That letter, until it is answered."""
    under_way: bool = False
    """Whether a letter is on its way there and back."""
    again: bool = False
    """Whether that letter was lost."""
    next: float = 0.0
    """Monotonic time before which the node is not asked."""
    awaits: list[int] = field(default_factory=list)
    """Ids of the answers that the silo waits for; none: it works."""
    ended: bool = False
    """Whether the silo has said that it has ended."""
    troubles: int = 0
    """Failures and refusals in a row."""
    refusal: str = ""
    """Why the node is refused, until it has been told."""
    secured: Secured | None = None
    stream: Stream | None = None
    inbox: Inbox | None = None
    answers: deque[tuple[int, bytes]] = field(default_factory=deque)
    """Ids and frames that are ready for the silo; its pump appends to them without a lock."""


class RootEnd:
    """Answers the courier (the ServerApp) on behalf of the root.

    Who a silo is, its certificate says, which the root sees through all that lies between. What a node says of itself
    only helps to name mistakes early. A silo is served at one node; another that names it while that one is online is
    refused.

    Args:
        service: the root.
        identity: the root's.
        silos: the names of those that may connect.
        limit: largest frame in bytes.
        speaks: whether a letter to this silo, which works, would be answered with something. By default it is: a
            courier's letter is held until then.
    """

    def __init__(
        self,
        service: WatchedService,
        identity: Identity,
        silos: Collection[str],
        limit: int,
        speaks: Callable[[str], bool] = lambda silo: True,
    ) -> None:
        self._service, self._identity, self._limit, self._speaks = service, identity, limit, speaks
        self._accounts = {silo: PeerAccount(service, silo, limit, KEEP_SECONDS) for silo in silos}
        self._lock = threading.Lock()
        """Guards the callers. What a silo says is handled under it, but for what becomes of its answers."""
        self._news = threading.Condition()
        """Notified when something may be due."""
        self._callers: dict[int, _Caller] = {}
        self._online: frozenset[int] = frozenset()
        self._heard = 0.0
        self._courier = ""
        """The name of the one that collected last."""
        self._closed = False
        self.over = threading.Event()
        """Set once the courier has been told that the federation is over."""

    def exchange(self, letter: Letter) -> Letter:
        """The answer to a letter of the courier: ``arrived`` with what a silo said, ``failed``, or ``collect``, which
        asks for the letters that are to go to nodes now."""
        kind = letter.head["kind"]
        if kind == "collect":
            return self._collect(letter)
        with self._lock:
            if self._closed:  # its silos may be connected to another end by now, which has what was not answered
                return Letter({})
            caller = self._callers.setdefault(letter.head["node"], _Caller(letter.head["node"]))
            caller.under_way = False
            if kind == "failed":
                self._fail(caller, letter.head["reason"])
            else:
                self._arrive(caller, letter)
        return Letter({})

    def close(self) -> None:
        """End all streams, and handle nothing that arrives late."""
        with self._lock:
            self._closed = True
            for caller in self._callers.values():
                _leave(caller)

    def _collect(self, letter: Letter) -> Letter:
        online, end = frozenset(letter.head["online"]), time.monotonic() + float(letter.head.get("wait", 0.0))
        with self._lock:
            self._note_courier(str(letter.head.get("courier", "")))
            self._online = online
            for node in online:
                self._callers.setdefault(node, _Caller(node))
            self._note_heard()
        while not (found := self._letters()) and (left := end - time.monotonic()) > 0:
            with self._news:
                self._news.wait(min(left, NEWS_SECONDS))
        with self._lock:
            vitals = self._service.vitals()
            over = (vitals.state == "finished" or bool(vitals.failure)) and self._all_told()
        if over:
            self.over.set()
        heads, bodies = [head for head, _ in found], tuple(body for _, body in found)
        return Letter({"letters": heads, "over": over, "failure": vitals.failure if over else ""}, bodies)

    def _note_courier(self, name: str) -> None:
        """What a courier before this one had under way is lost with it."""
        if name != self._courier:
            self._courier = name
            for caller in self._callers.values():
                caller.again |= caller.under_way and bool(caller.session)
                caller.under_way = False

    def _letters(self) -> list[tuple[dict[str, object], bytes]]:
        """What is to go to nodes now."""
        with self._lock:
            return [self._next_letter(caller) for caller in self._due()]

    def _due(self) -> list[_Caller]:
        now = time.monotonic()
        return [one for one in self._callers.values() if one.node in self._online and self._is_due(one, now)]

    def _is_due(self, caller: _Caller, now: float) -> bool:
        if caller.under_way or caller.ended or now < caller.next:
            return False
        if caller.refusal or caller.again or not caller.session:
            return True
        assert caller.secured is not None
        if not caller.silo:
            return caller.secured.has_outgoing
        if not caller.awaits:
            return self._speaks(caller.silo)
        return any(id in caller.awaits for id, _ in list(caller.answers))

    def _next_letter(self, caller: _Caller) -> tuple[dict[str, object], bytes]:
        caller.under_way = True
        head: dict[str, object] = {"node": caller.node}
        if caller.refusal:
            head["refused"], caller.refusal = caller.refusal, ""
            head |= {"session": caller.session, "number": caller.number + 1}
            body = b"" if caller.secured is None else caller.secured.outgoing()  # TLS says what it does not trust
            caller.next, caller.session, caller.number = time.monotonic() + AGAIN_SECONDS, "", 0
            return head, body
        if not caller.session:
            return head, b""
        if not caller.again:
            assert caller.secured is not None
            while caller.answers:
                caller.secured.send(caller.answers.popleft()[1])
            caller.number, caller.body = caller.number + 1, caller.secured.outgoing()
        caller.again = False
        return head | {"session": caller.session, "number": caller.number}, caller.body

    def _arrive(self, caller: _Caller, letter: Letter) -> None:
        """What a silo said, in answer to the last letter."""
        told = letter.head
        if told.get("refused"):
            self._fail(caller, told["refused"])
            return
        caller.claimed = str(told["silo"])
        try:
            if told["number"] == 0 and not told.get("over"):
                self._begin(caller, str(told["session"]))
            elif (told["session"], told["number"]) != (caller.session, caller.number) and not told.get("over"):
                return  # the answer to a letter that was given up
            self._receive(caller, b"".join(letter.bodies))
        except IsthmusError as error:
            self._refuse(caller, error)
            return
        caller.awaits, caller.troubles = list(told.get("awaits") or ()), 0
        if told.get("over"):
            self._end(caller, str(told.get("failure") or ""))

    def _end(self, caller: _Caller, failure: str) -> None:
        """The silo has ended. Before the federation it may be started again, and the node is asked in a while."""
        level = logging.WARNING if failure else logging.INFO
        log.log(level, "%s has ended%s", caller.claimed, failure and f": {failure}")
        _leave(caller)
        caller.ended = not failure
        caller.troubles += bool(failure)
        caller.session, caller.silo, caller.next = "", "", time.monotonic() + AGAIN_SECONDS

    def _begin(self, caller: _Caller, session: str) -> None:
        """A new connection of the silo behind a node.

        Raises:
            IdentityError: there is no such silo, or it is served at another node.
        """
        _leave(caller)
        self._check_claim(caller, caller.claimed)
        self._identity = self._identity.renewed()
        caller.session, caller.number, caller.ended = session, 0, False
        caller.again, caller.silo, caller.inbox, caller.awaits = False, "", None, [0]
        caller.answers = deque()  # what is left of the last connection's pump keeps the other
        caller.secured = Secured(self._identity, limit=self._limit)

    def _receive(self, caller: _Caller, data: bytes) -> None:
        if caller.secured is None:
            return
        for message in caller.secured.receive(data):
            self._check_certificate(caller)
            if caller.inbox is None:
                self._welcome(caller, message)
            else:
                assert caller.stream is not None
                caller.inbox.receive(message, caller.stream)

    def _check_certificate(self, caller: _Caller) -> None:
        """Raise ``IdentityError`` unless the silo's certificate is valid now, and that of the silo it was."""
        assert caller.secured is not None
        certificate = caller.secured.certificate()
        name = caller.silo or common_name(x509.load_pem_x509_certificate(certificate))
        if name not in self._accounts:
            raise IdentityError(f"{name[:64]!r} may not connect to this root", remedy="list it in the recipe")
        self._identity = self._identity.renewed()
        self._identity.check_peer(certificate, name, "silo")
        if name != caller.claimed:
            raise IdentityError(
                f"node {caller.node} says that it is {caller.claimed}, and shows the certificate of {name}",
                remedy="correct silo in its --node-config",
            )
        self._check_claim(caller, name)
        caller.silo = name

    def _check_claim(self, caller: _Caller, silo: str) -> None:
        """Raise ``IdentityError`` if there is no such silo, or it is served at another node."""
        if silo not in self._accounts:
            known = ", ".join(sorted(self._accounts)[:8])
            raise IdentityError(
                f"node {caller.node} names the silo {silo[:64]!r}, which is not in the recipe",
                remedy=f"name one of these in its --node-config: {known}",
            )
        for other in self._callers.values():
            if other is not caller and other.silo == silo and other.node in self._online and not other.ended:
                raise IdentityError(
                    f"node {caller.node} names the silo {silo}, which node {other.node} has shown that it is",
                    remedy="give each silo one SuperNode",
                )

    def _welcome(self, caller: _Caller, message: bytes) -> None:
        """The first message of a connection: the name of the silo's channel, by which its answers are kept."""
        try:
            instance = str(json.loads(message)["instance"])[:MAX_INSTANCE]
        except (ValueError, LookupError, TypeError) as error:
            raise FrameError("a connection that begins otherwise", remedy="both sides need one version") from error
        stream = Stream(lambda: None)
        caller.stream, (caller.inbox, ended) = stream, self._accounts[caller.silo].connect(instance, stream)
        for one in ended:
            one.cancel()
        log.info("%s is connected to the root through Flower, at node %s", caller.silo, caller.node)
        pump = threading.Thread(target=self._pump, args=(caller.answers, caller.inbox, stream), daemon=True)
        pump.name = f"answers to {caller.silo}"
        pump.start()

    def _pump(self, answers: deque[tuple[int, bytes]], inbox: Inbox, stream: Stream) -> None:
        """Collect what the root answers on this stream."""
        while (data := inbox.next(stream)) is not None:
            answers.append((frames.parse(data).id, data))
            with self._news:
                self._news.notify_all()

    def _fail(self, caller: _Caller, reason: str) -> None:
        """The node did not answer its letter: it gets it again in a while."""
        if not caller.troubles:
            log.warning("node %s (%s): %s", caller.node, caller.claimed or "no silo yet", reason[:400])
        caller.troubles += 1
        caller.again = bool(caller.session)
        pause = min(AGAIN_SECONDS, 0.5 * 2.0 ** min(caller.troubles, 6))
        caller.next = max(caller.next, time.monotonic() + pause)

    def _refuse(self, caller: _Caller, error: IsthmusError) -> None:
        _leave(caller)
        caller.silo, caller.inbox = "", None
        caller.troubles += 1
        caller.refusal = f"{error.message}; remedy: {error.remedy}"
        log.warning("a node is refused: %s", error.message, extra={"service": "Root", "code": error.code})

    def _note_heard(self) -> None:
        """The root waits for nobody whose node is gone, and hears the others."""
        if time.monotonic() - self._heard < HEARD_SECONDS:
            return
        self._heard = time.monotonic()
        for caller in self._callers.values():
            if caller.silo and caller.node in self._online and not caller.ended:
                self._service.handle(caller.silo, pb.Ping())

    def _all_told(self) -> bool:
        """Whether every node that is there has heard the end, or cannot."""
        here = [one for one in self._callers.values() if one.node in self._online]
        return bool(here) and all((one.ended or one.troubles) and not one.under_way for one in here)


def _leave(caller: _Caller) -> None:
    """End the connection of the silo behind a node."""
    if caller.inbox is not None and caller.stream is not None:
        caller.inbox.leave(caller.stream)
    caller.stream = None


@contextmanager
def carried(socket: Path, recipe: Recipe, root: Service, identity: Identity) -> Iterator[None]:
    """Answer the Flower app at this socket on behalf of the root while the block runs.

    Raises:
        NotSupportedError: Flower cannot carry the recipe's frames.
        RunError: there can be no such socket.
    """
    check_carried(recipe)
    assert isinstance(root, Watched)
    end = RootEnd(root, identity, recipe.tree.node(ROOT).children, recipe.wire.max_frame_bytes)
    with closing(end), listening(socket, end.exchange):
        log.info("waiting for Flower at %s", socket)
        yield
