"""A federation whose parties join by invites, as real processes: keys are renewed, and a party leaves, while it
trains."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.storage.journal import read_journal
from isthmus.wire.authority import private_pem
from isthmus.wire.identity import replace_certificate
from tests.integration.processes import (
    Command,
    Commands,
    free_port,
    rows_of,
    steps_of,
    until,
    write_federation,
    write_rows,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
NAMES = ("north", "south", "east", "west")
"""Of four silos one may leave a masked sum."""


class Led:
    """A coordinator's folder with a trunk and root that answers invites, and silos that join it."""

    def __init__(self, commands: Commands, folder: Path, **sections: object) -> None:
        self.commands, self.folder = commands, folder
        address = {"address": f"localhost:{free_port()}"}
        silos = [{"name": name, "train": f"{name}.jsonl"} for name in NAMES]
        values = {"train": {"rounds": 30, "steps": 4, "evaluate": False}, "silo": silos, "root": address}
        values["root"] = {**address, "patience": 3.0, "minimum": 3}
        self.recipe = write_federation(folder / "leader", trunk={**address, "patience": 3.0}, **{**values, **sections})
        self.authority = folder / "leader" / "authority"
        commands.run("authority", "init", self.recipe, self.authority).succeeded()
        self.run = folder / "leader" / "run"
        self.server = commands.start(
            *("trunk", self.recipe, "--with-root", "--authority", self.authority, "--run-dir", self.run)
        )
        assert self.server.address

    def join(self, name: str) -> Path:
        invited = self.commands.run("invite", name, "--authority", self.authority)
        invited.succeeded()
        rows = write_rows(self.folder / f"{name}.jsonl", rows_of(name))
        joined = self.commands.run("join", invited.out.strip(), "--train", rows, "--folder", self.folder / name)
        joined.succeeded()
        return self.folder / name

    def silo(self, name: str) -> Command:
        home = self.folder / name
        return self.commands.start("silo", home / "recipe.toml", name, "--run-dir", home / "run")

    def rounds(self) -> dict[int, list[str]]:
        """By round, the silos that contributed, as the root noted."""
        lines = read_journal(self.run / "root" / "metrics.jsonl")
        return {line["round"]: sorted(line["weights"]) for line in lines if "weights" in line}

    def until_round(self, number: int) -> None:
        until(lambda: max(self.rounds(), default=0) >= number, f"round {number}", command=self.server)

    def age(self, name: str) -> int:
        """Give a party a certificate of which little is left; returns its serial number."""
        folder, key = AuthorityFolder(self.authority), ec.generate_private_key(ec.SECP256R1())
        last = x509.load_pem_x509_certificate(self.certificate(name).read_bytes())
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(last.issuer, last.subject, key.public_key(), x509.random_serial_number())
        for one in last.extensions:
            if one.oid != x509.SubjectKeyIdentifier.oid:
                builder = builder.add_extension(one.value, one.critical)
        made = (
            builder.not_valid_before(now - day)
            .not_valid_after(now + day / 8)
            .sign(folder._authority._key, hashes.SHA256())
        )
        replace_certificate(
            self.certificate(name).parent, made.public_bytes(serialization.Encoding.PEM), private_pem(key)
        )
        return made.serial_number

    def serial(self, name: str) -> int:
        return x509.load_pem_x509_certificate(self.certificate(name).read_bytes()).serial_number

    def certificate(self, name: str) -> Path:
        home = self.run.parent if name == "trunk" else self.folder / name
        return home / "certificates" / name / "cert.pem"


def test_keys_are_renewed_while_it_trains_and_no_round_is_lost(commands: Commands, tmp_path: Path) -> None:
    led = Led(
        commands,
        tmp_path,
        train={"rounds": 100_000, "steps": 4, "evaluate": False},
        federation={"secure": {"masks": True}},
    )
    for name in NAMES:
        led.join(name)
    silos = [led.silo(name) for name in NAMES]
    led.until_round(2)
    before = {name: led.age(name) for name in ("north", "east", "trunk")}
    until(lambda: all(led.serial(name) != old for name, old in before.items()), "all keys to be renewed")
    renewed = max(led.rounds())
    led.until_round(renewed + 5)
    for one in (*silos, led.server):
        one.process.terminate()
        one.wait()
    found = led.rounds()
    assert found == {number: sorted(NAMES) for number in range(1, len(found) + 1)}
    for name in NAMES:
        steps = steps_of(tmp_path / name / "run", name)
        assert steps == [(1 + count // 4, 1 + count % 4) for count in range(len(steps))]  # none was taken twice


@pytest.mark.parametrize("masks", [False, True])
def test_a_revoked_silo_is_out_at_once_and_the_others_go_on(masks: bool, commands: Commands, tmp_path: Path) -> None:
    led = Led(commands, tmp_path, federation={"secure": {"masks": masks}})
    for name in NAMES:
        led.join(name)
    silos = {name: led.silo(name) for name in NAMES}
    led.until_round(3)
    commands.run("revoke", "south", "--authority", led.authority).succeeded()
    silos["south"].wait().failed("revoked on", "new invite")
    for name in ("north", "east", "west"):
        silos[name].wait().succeeded()
    found = led.rounds()
    assert sorted(found) == list(range(1, 31))
    assert all({"north", "east", "west"} <= set(names) for names in found.values())
    assert found[30] == ["east", "north", "west"]
    again = commands.run("silo", tmp_path / "south" / "recipe.toml", "south", "--run-dir", tmp_path / "south" / "run")
    again.failed("revoked on")


def test_a_silo_that_is_added_takes_part_and_nobody_else_does_anything(commands: Commands, tmp_path: Path) -> None:
    """Under masks: the others sum with it by the authority's word, though their recipes do not name it."""
    led = Led(
        commands,
        tmp_path,
        train={"rounds": 100_000, "steps": 4, "evaluate": False},
        federation={"secure": {"masks": True}},
    )
    for name in NAMES:
        led.join(name)
    silos = {name: led.silo(name) for name in NAMES}
    led.until_round(2)
    values = tomllib.loads(led.recipe.read_text())
    values["silo"].append({"name": "late", "train": "late.jsonl"})
    led.recipe.write_text(tomli_w.dumps(values))
    led.join("late")
    silos["late"] = led.silo("late")
    until(lambda: any("late" in names for names in led.rounds().values()), "late to take part", command=silos["late"])
    led.until_round(max(led.rounds()) + 5)
    assert all(one.process.is_running() for one in (*silos.values(), led.server))
    for one in (*silos.values(), led.server):
        one.process.terminate()
        one.wait()
    found = led.rounds()
    first = min(number for number, names in found.items() if "late" in names)
    assert sorted(found) == list(range(1, len(found) + 1))
    for number, names in found.items():
        assert set(names) >= set(NAMES)
        assert ("late" in names) is (number >= first)
    for name in NAMES:
        steps = steps_of(tmp_path / name / "run", name)
        assert steps == [(1 + count // 4, 1 + count % 4) for count in range(len(steps))]
