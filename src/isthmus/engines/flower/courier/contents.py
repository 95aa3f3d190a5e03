"""Letters as the content of Flower's messages."""

from __future__ import annotations

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from .letters import Letter


def content_of(letter: Letter) -> RecordDict:
    """A letter as a message's content. Its bytes are an array of bytes: Flower sends large ones in parts."""
    head = ConfigRecord({"head": json.dumps(dict(letter.head))})
    content = RecordDict({"letter": head})
    body = b"".join(letter.bodies)
    if body:
        content["body"] = ArrayRecord({"bytes": Array("uint8", (len(body),), "isthmus.bytes", body)})
    return content


def letter_in(content: RecordDict) -> Letter:
    """The letter that is a message's content."""
    head = json.loads(str(content.config_records["letter"]["head"]))
    body = content.array_records["body"]["bytes"].data if "body" in content.array_records else b""
    return Letter(head, (body,))
