"""Letters in Flower's messages, in Flower's environment."""

from __future__ import annotations

from pathlib import Path

from tests.integration.flowers import in_flower, needs_flower

pytestmark = needs_flower


def test_a_letter_is_the_same_after_its_way_as_a_message(tmp_path: Path) -> None:
    """Through the very bytes of Flower's wire."""
    in_flower(
        tmp_path,
        """
        from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
        from isthmus_courier.contents import content_of, letter_in
        from isthmus_courier.letters import Letter

        for body in (b"", b"x", bytes(range(256)) * 30_000):
            letter = Letter({"node": 2**63, "session": "s", "hold": 1.5, "awaits": [1], "refused": None}, (body,))
            content = recorddict_from_proto(recorddict_to_proto(content_of(letter)))
            assert letter_in(content) == letter
        """,
    )
