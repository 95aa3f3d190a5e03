"""What deployed roles log: JSON lines on standard error, and nothing of the silos' rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import Command, Commands, free_port, rows_of, until, write_federation, write_rows

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
CANARY = "w17 w23 w5 w31 w29 w11"
"""Words of the tiny model, in an order that no other row has."""


def logged(command: Command) -> list[dict[str, Any]]:
    """The JSON lines of a role. Each line is one."""
    return [json.loads(line) for line in command.stderr.splitlines()]


def test_deployed_roles_log_what_they_do_and_no_text(commands: Commands, tmp_path: Path) -> None:
    address = {"address": f"localhost:{free_port()}"}
    train = {"rounds": 2, "steps": 3, "evaluate": False}
    recipe = write_federation(tmp_path / "made", train=train, trunk=address, root=address)
    for name in ("north", "south"):
        rows = [{"text": f"{row['text']} {CANARY}", "label": f"{CANARY}"} for row in rows_of(name)]
        write_rows(recipe.parent / f"{name}.jsonl", rows)
    commands.start("certificates", recipe).wait().succeeded()
    server = commands.start("trunk", recipe, "--with-root", "--run-dir", tmp_path / "run")
    silos = {
        name: commands.start("silo", recipe, name, "--run-dir", tmp_path / f"run-{name}") for name in ("north", "south")
    }
    for silo in silos.values():
        silo.wait().succeeded()
    until(lambda: "south has left the root" in server.stderr, "the silos' leaving to be logged", command=server)
    server.process.terminate()
    server.wait().succeeded()
    assert server.stdout.startswith(f"listening at {address['address']}\n")

    lines = logged(server)
    assert {line["role"] for line in lines} == {"both"}
    (started,) = (line for line in lines if line["event"].startswith("started: isthmus "))
    assert started["fields"]["address"] == address["address"]
    begun = [
        line["fields"] for line in lines if " begins with " in line["event"] and "present" in line.get("fields", {})
    ]
    assert [(one["round"], one["present"], one["missing"]) for one in begun] == [
        (1, ["north", "south"], "nobody"),
        (2, ["north", "south"], "nobody"),
    ]
    saved = [line["fields"] for line in lines if " is saved, " in line["event"]]
    assert [one["round"] for one in saved] == [1, 2]
    assert all(one["seconds"] > 0 for one in saved)
    came = {
        (line["fields"]["peer"], line["fields"]["service"]) for line in lines if " is connected to " in line["event"]
    }
    assert came == {(peer, service) for peer in silos for service in ("Trunk", "Root")}
    for name, silo in silos.items():
        own = logged(silo)
        assert {line["role"] for line in own} == {f"silo {name}"}
        ended = [line["fields"]["round"] for line in own if " ended after " in line["event"]]
        assert ended == [1, 2]
    for command in (server, *silos.values()):
        assert CANARY not in command.stdout + command.stderr


@pytest.mark.parametrize("row", [{"text": CANARY}, {"text": CANARY, "label": None}, CANARY], ids=str)
def test_a_bad_row_is_named_by_file_and_line_alone(commands: Commands, tmp_path: Path, row: Any) -> None:
    recipe = write_federation(tmp_path / "made", train={"evaluate": False})
    path = recipe.parent / "north.jsonl"
    path.write_text(path.read_text() + json.dumps(row)[: -1 if row == CANARY else None] + "\n")
    commands.start("certificates", recipe).wait().succeeded()
    silo = commands.start("silo", recipe, "north", "--run-dir", tmp_path / "run")
    silo.wait().failed("north.jsonl:13")
    assert CANARY not in silo.stdout + silo.stderr
    plain = silo.stderr[silo.stderr.index("error: ") :]
    assert all(line.startswith("{") for line in silo.stderr.removesuffix(plain).splitlines())
