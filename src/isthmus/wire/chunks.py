"""Large frames in chunks, so that both sides see that bytes flow while a slow line carries one frame for minutes."""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.errors import FrameError, FrameSizeError
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb

FRAME_CHUNK = 2**18
"""Most bytes of a frame in one message; a larger frame goes in several, one after another."""
FLOW_ID = 2**64 - 2
"""Id of the pong with which a server says that a chunk has come."""
FLOW = frames.wrap(pb.Pong(), id=FLOW_ID).SerializeToString()
OVERHEAD = 64
"""Most bytes of such a message beside the frame's."""
_FIRST = bytes([pb.Frame.DESCRIPTOR.fields_by_name["chunk"].number << 3 | 2])
"""What a chunk begins with, and no frame."""


def in_chunks(data: bytes) -> Iterator[bytes]:
    """The messages in which a frame goes: the frame itself if it is small."""
    if len(data) <= FRAME_CHUNK:
        yield data
        return
    for start in range(0, len(data), FRAME_CHUNK):
        part = data[start : start + FRAME_CHUNK]
        yield pb.Frame(chunk=part, left=len(data) - start - len(part)).SerializeToString()


class Assembler:
    """Joins the chunks of one stream's frames.

    Args:
        limit: largest frame in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._left = 0
        """Bytes of the frame that are still to come."""

    def add(self, data: bytes) -> bytes | None:
        """Take a message; returns the frame that it completes, or None.

        Raises:
            FrameError: it is not what is to come next.
            FrameSizeError: its frame is larger than allowed.
        """
        if data[:1] != _FIRST:
            if self._parts:
                raise _unexpected(f"a frame where {self._left} bytes of another one are to come")
            return data
        if len(data) > FRAME_CHUNK + OVERHEAD:
            raise _unexpected(f"a chunk of {len(data)} bytes")
        frame = frames.parse(data)
        part, left = frame.chunk, frame.left
        if not part or (left and len(part) != FRAME_CHUNK) or (self._parts and len(part) + left != self._left):
            raise _unexpected("a chunk that is not the next one")
        if not self._parts and len(part) + left > self._limit:
            raise FrameSizeError(
                f"a frame of {len(part) + left:,} bytes; {self._limit:,} are allowed",
                remedy="send less at a time, or raise wire.max_frame_bytes on both sides",
            )
        self._parts.append(part)
        self._left = left
        if left:
            return None
        whole, self._parts = b"".join(self._parts), []
        return whole


def _unexpected(what: str) -> FrameError:
    return FrameError(f"received {what}", remedy="both sides must run the same version of isthmus")
