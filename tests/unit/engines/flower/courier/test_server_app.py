"""The ServerApp, in Flower's environment, with a grid of two nodes that are functions."""

from __future__ import annotations

from pathlib import Path

from tests.integration.flowers import in_flower, needs_flower

pytestmark = needs_flower
GRID = """
        import sys
        from types import SimpleNamespace
        from pathlib import Path
        from flwr.app import Context, Error, Message, RecordDict
        from isthmus_courier import server_app
        from isthmus_courier.contents import content_of, letter_in
        from isthmus_courier.letters import Letter, Postbox

        class Grid:
            sent = {}

            def get_nodes(self):
                return [SimpleNamespace(node_id=node, last_activated_at="noon") for node in (3, 4)]

            def push_messages(self, messages):
                for one in messages:
                    one.metadata.__dict__.update(_message_id=f"to {one.metadata.dst_node_id}")
                    self.sent[one.metadata.message_id] = one
                return [one.metadata.message_id for one in messages]

            def pull_messages(self, names):
                return [self._reply(self.sent.pop(name)) for name in list(names) if name in self.sent]

            def _reply(self, message):
                if message.metadata.dst_node_id == 4:
                    return Message(Error(code=3, reason="it burns"), reply_to=message)
                return Message(content_of(Letter({"silo": "north"}, (b"up",))), reply_to=message)

        told = []

        def root(letter):
            told.append(letter)
            kinds = [one.head["kind"] for one in told]
            over = kinds.count("collect") > 1
            due = [] if over else [{"node": 3}, {"node": 4}]
            return Letter({"letters": due, "over": over, "failure": ""}, (b"down",) * len(due))

        def context(**config):
            config = {"root": str(Path("box").absolute()), "hold": 1.0, "simulate": ""} | config
            return Context(1, 0, {}, RecordDict(), config)
"""


def test_letters_go_to_nodes_and_answers_to_the_root(tmp_path: Path) -> None:
    in_flower(
        tmp_path,
        GRID
        + """
        with Postbox(Path("box"), root):
            server_app.server(Grid(), context())
        heads = [one.head for one in told if one.head["kind"] != "collect"]
        assert {"kind": "arrived", "silo": "north", "node": 3} in heads
        assert [one["node"] for one in heads if one["kind"] == "failed"] == [4], heads
        assert "it burns" in next(one["reason"] for one in heads if one["kind"] == "failed")
        """,
    )


def test_a_simulation_starts_its_federation_and_ends_it(tmp_path: Path) -> None:
    in_flower(
        tmp_path,
        GRID
        + """
        box = Path("box").absolute()
        with Postbox(box, root):
            command = f"{sys.executable} -c 'print(\\"listening at {box}\\")'"
            server_app.server(Grid(), context(simulate=command))
        try:
            server_app.server(Grid(), context(simulate=f"{sys.executable} -c 'raise SystemExit(3)'"))
        except RuntimeError as error:
            assert "ended with exit code 3" in str(error), error
        else:
            raise AssertionError
        """,
    )


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    in_flower(
        tmp_path,
        GRID
        + """
        server_app.ROOT_SECONDS = 0.0
        try:
            server_app.server(Grid(), context())
        except RuntimeError as error:
            assert "no root answers at" in str(error), error
            assert "--flower" in str(error), error
        else:
            raise AssertionError
        """,
    )
