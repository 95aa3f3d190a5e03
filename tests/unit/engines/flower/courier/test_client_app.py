"""The ClientApp, in Flower's environment."""

from __future__ import annotations

from pathlib import Path

from tests.integration.flowers import in_flower, needs_flower

pytestmark = needs_flower
MESSAGE = """
        from flwr.app import Context, Message, RecordDict
        from isthmus_courier import client_app
        from isthmus_courier.contents import content_of, letter_in
        from isthmus_courier.letters import Letter, Postbox
        from pathlib import Path

        message = Message(content_of(Letter({"hold": 1.0}, (b"down",))), 7, "train")
        message.metadata.__dict__.update(_message_id="m")
        context = Context(1, 7, {"silo": "north", "socket": "box"}, RecordDict(), {})
"""


def test_a_message_is_handed_to_the_silo_and_its_answer_sent_back(tmp_path: Path) -> None:
    in_flower(
        tmp_path,
        MESSAGE
        + """
        with Postbox(Path("box"), lambda letter: Letter({"heard": letter.head["silo"]}, (b"up",))):
            reply = client_app.client(message, context)
        assert letter_in(reply.content) == Letter({"heard": "north"}, (b"up",))
        assert reply.metadata.dst_node_id == message.metadata.src_node_id
        """,
    )


def test_another_flwr_is_refused_by_name(tmp_path: Path) -> None:
    in_flower(
        tmp_path,
        MESSAGE
        + """
        client_app.flwr.__version__ = "1.99.0"
        try:
            client_app.client(message, context)
        except RuntimeError as error:
            assert "flwr 1.99.0 is installed" in str(error), error
        else:
            raise AssertionError
        """,
    )
