"""Who may send what to whom: by service and kind of request, the roles whose certificates may send it.

Whoever may connect at all is known by certificate and recipe (``server``): silos to the trunk; to root and edges their
own children, which are silos or edges, and an edge's sibling's silos. A trunk asks the authority alone; so may a guest,
who has an invite and no role yet; a root asks the trunk, too, where the cut moves.
"""

from __future__ import annotations

from typing import Literal

from google.protobuf.message import Message

from isthmus.errors import ProtocolError
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.identity import Role

ServiceName = Literal["Trunk", "Root", "Authority", "Model", "Moves"]
SENDERS: dict[ServiceName, dict[type[Message], tuple[Role, ...]]] = {
    "Trunk": dict.fromkeys(
        (pb.Hello, pb.Ping, pb.Begin, pb.Commit, pb.End, pb.Keep, pb.Forward, pb.Backward, pb.Decode, pb.Close),
        ("silo",),
    ),
    "Root": dict[type[Message], tuple[Role, ...]](
        dict.fromkeys((pb.Hello, pb.Ping, pb.Ready, pb.Update, pb.Current), ("silo", "edge"))
    )
    | dict.fromkeys((pb.Deal, pb.Agree, pb.Reveal), ("silo",)),
    "Authority": dict.fromkeys((pb.Ping, pb.Enroll, pb.Withdrawals), ("silo", "edge", "trunk", "root")),
    "Model": dict.fromkeys((pb.Ping, pb.Listing, pb.Fetch), ("silo",)),
    "Moves": dict.fromkeys((pb.Ping, pb.Move), ("silo", "root")),
}
"""By service (edges' is ``Root``, too) and kind of request, the roles that may send it; what is not there nobody may.
The same table is in docs/threat-model.md."""
_WHERE: dict[ServiceName, str] = {
    "Trunk": "the trunk",
    "Root": "the edge or root above",
    "Authority": "the authority",
    "Model": "the trunk, as a request for its files",
    "Moves": "the trunk, as a move of the cut",
}


def check_sender(title: str, service: ServiceName, role: Role, request: Message) -> None:
    """Check that a party of this role may send such a request.

    Args:
        title: of the service, for the message: ``the trunk``, ``the edge left``.

    Raises:
        ProtocolError: it may not.
    """
    kind = type(request)
    if role in SENDERS[service].get(kind, ()):
        return
    other = next((place for name, place in _WHERE.items() if role in SENDERS[name].get(kind, ())), None)
    raise ProtocolError(
        f"{title} does not answer {kind.__name__} requests of {role}s",
        remedy=f"send it to {other}" if other else "both sides must run the same version of isthmus",
    )
