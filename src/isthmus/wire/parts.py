"""How many parts a frame has, counted before it is parsed: small parts, once parsed, take many times their bytes.

Numbers in bulk are few parts, each of many bytes. So are all honest frames; what has more parts is refused unparsed.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from isthmus.errors import FrameError
from isthmus.wire import isthmus_pb2 as pb

MAX_PARTS = 2**17
"""Parts of a frame: its fields and those within them, entries of maps, and bytes of packed whole numbers."""
SMALL_FRAME = 2**16
"""Bytes of a frame that is not counted: parsed, it takes a megabyte or two at most."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10
_TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
Kind = dict[int, Any]
"""Of a message type, by number: the kind of a field that is a message, or ``_PACKED``. Other fields are left out."""
_PACKED = None


def check_parts(data: bytes, most: int = MAX_PARTS) -> None:
    """Check that a frame has no more than so many parts. It stops at the first one too many.

    Raises:
        FrameError: it has more, or its bytes are not a frame's.
    """
    if len(data) <= SMALL_FRAME:
        return
    try:
        left = _count(data, 0, len(data), _FRAME, most)
    except (IndexError, ValueError) as error:
        raise FrameError(
            f"received {len(data)} bytes that are not a frame", remedy="both sides must run the same version of isthmus"
        ) from error
    if left < 0:
        raise FrameError(
            f"received a frame of more than {most:,} parts (fields, names, entries)",
            remedy="send fewer tensors or silos in one frame; both sides must run the same version of isthmus",
        )


def _count(data: bytes, at: int, end: int, kind: Kind, left: int) -> int:
    """What is left of so many parts after those of the message between two places; below 0 as soon as it has more.

    Raises:
        IndexError, ValueError: the bytes are not fields.
    """
    while at < end:
        left -= 1
        if left < 0:
            return left
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            inner = kind.get(number, ())
            if inner is _PACKED:
                left -= size
            elif inner != () and at + size <= end:
                left = _count(data, at, at + size, inner, left)
            if left < 0:
                return left
            at += size
        else:
            at += _WIDTHS[wire] if wire in _WIDTHS else _unknown(wire)
    if at != end:
        raise ValueError("a field beyond the end")
    return left


def _unknown(wire: int) -> int:
    raise ValueError(f"the wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 128:
        return value, at + 1
    value &= 127
    for place in range(1, _LONGEST_VARINT):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("a number without an end")


def _kind_of(descriptor: Any) -> Kind:
    kind: Kind = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            kind[field.number] = _kind_of(field.message_type)
        elif field.is_repeated and field.type not in _TEXT:
            kind[field.number] = _PACKED
    return kind


_FRAME = _kind_of(pb.Frame.DESCRIPTOR)
