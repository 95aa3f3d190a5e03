"""The ServerApp: the courier between the root, which lives on beside it, and the nodes."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import flwr
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from .contents import content_of, letter_in
from .delivery import Courier, Delivered, check_version, checked_socket
from .letters import Letter, ask

LISTENING = "listening at "
ROOT_SECONDS = 60.0
"""Time for which the root may be away, as when it starts again."""
CARRY_SECONDS = 0.5
"""Time between two looks for answers."""
server = ServerApp()


class GridMail:
    """Flower's grid as the courier needs it."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self) -> dict[int, str]:
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}

    def send(self, letters: Collection[tuple[int, Letter]], ttl: float) -> list[str | None]:
        messages = [Message(content_of(letter), node, "train", ttl=ttl) for node, letter in letters]
        return [name or None for name in self._grid.push_messages(messages)]

    def fetch(self, messages: Collection[str]) -> list[Delivered]:
        return [_delivered(one) for one in self._grid.pull_messages(messages)]


def _delivered(reply: Message) -> Delivered:
    name = reply.metadata.reply_to_message_id
    if reply.has_error():
        return Delivered(name, None, f"{reply.error.reason} (Flower's code {reply.error.code})")
    return Delivered(name, letter_in(reply.content))


@server.main()
def carry_letters(grid: Grid, context: Context) -> None:
    """Carry letters until the federation is over."""
    check_version(flwr.__version__)
    config = context.run_config
    with _root(str(config["root"]), str(config["simulate"])) as (path, extra):
        courier = Courier(
            GridMail(grid),
            lambda letter: _ask(path, letter),
            float(str(config["hold"])) if not extra else 0.0,
            extra,
        )
        while courier.carry(CARRY_SECONDS):
            time.sleep(0.05)


def _ask(path: str, letter: Letter) -> Letter:
    try:
        return ask(path, letter, patience=ROOT_SECONDS)
    except OSError as error:
        raise RuntimeError(
            f"no root answers at {path} ({error}); start it with --flower {path}, then this app again: it goes on"
        ) from error


@contextmanager
def _root(path: str, simulate: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The root's socket, and what letters to nodes say besides. A simulation starts root, trunk and silos."""
    if not simulate:
        yield checked_socket(path), {}
        return
    process = subprocess.Popen(shlex.split(simulate), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith(LISTENING)), None)
        if line is None:
            raise RuntimeError(f"the federation did not start: {simulate} ended with exit code {process.wait()}")
        found = line.removeprefix(LISTENING).strip()
        yield found, {"socket": found}
        process.wait(ROOT_SECONDS)
    finally:
        process.terminate()
        process.wait()
