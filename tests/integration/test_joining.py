"""A federation whose parties join by invites, as real processes: keys are renewed, and a party leaves, while it
trains."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.joining.join import OwnFiles, join_federation
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
    """A coordinator's folder with a trunk and root that answers invites, and silos that join it.

    Args:
        sections: of the recipe, in place of those of a long run under masks.
    """

    def __init__(self, commands: Commands, folder: Path, names: Sequence[str] = NAMES, **sections: Any) -> None:
        self.commands, self.folder = commands, folder
        address = {"address": f"localhost:{free_port()}"}
        silos = [{"name": name, "train": f"{name}.jsonl"} for name in names]
        self.names = list(names)
        self.recipe = write_federation(
            folder / "leader",
            silo=silos,
            trunk={**address, "patience": 20.0},
            **{
                "train": {"rounds": 100_000, "steps": 4, "evaluate": False},
                "root": {**address, "patience": 20.0, "minimum": 3},
                "federation": {"secure": {"masks": True}},
                **{name: {**address, **one} if name == "root" else one for name, one in sections.items()},
            },
        )
        self.authority = folder / "leader" / "authority"
        AuthorityFolder.create(self.authority, self.recipe)
        self.run = folder / "leader" / "run"
        self.server = commands.start(
            *("trunk", self.recipe, "--with-root", "--authority", self.authority, "--run-dir", self.run)
        )
        assert self.server.address

    def add(self, name: str) -> None:
        """Write another silo into the recipe."""
        values = tomllib.loads(self.recipe.read_text())
        values["silo"].append({"name": name, "train": f"{name}.jsonl"})
        self.recipe.write_text(tomli_w.dumps(values))
        self.names.append(name)

    def join(self, name: str) -> None:
        """As ``isthmus invite`` and ``isthmus join``, but in this process: six processes start sooner than sixteen."""
        rows = write_rows(self.folder / f"{name}.jsonl", rows_of(name))
        invite = AuthorityFolder(self.authority).invite(name)
        join_federation(invite, self.folder / name, OwnFiles((str(rows),)))

    def silo(self, name: str) -> Command:
        home = self.folder / name
        return self.commands.start("silo", home / "recipe.toml", name, "--run-dir", home / "run")

    def rounds(self) -> dict[int, list[str]]:
        """By round, the silos that contributed, as the root noted."""
        lines = read_journal(self.run / "root" / "metrics.jsonl")
        return {line["round"]: sorted(line["weights"]) for line in lines if "weights" in line}

    def until_round(self, number: int) -> None:
        until(lambda: max(self.rounds(), default=0) >= number, f"round {number}", command=self.server)

    def age(self, name: str, left: datetime.timedelta = datetime.timedelta(hours=3)) -> int:
        """Give a party a certificate of which this little is left; returns its serial number."""
        folder, key = AuthorityFolder(self.authority), ec.generate_private_key(ec.SECP256R1())
        last = x509.load_pem_x509_certificate(self.certificate(name).read_bytes())
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(last.issuer, last.subject, key.public_key(), x509.random_serial_number())
        for one in last.extensions:
            if one.oid != x509.SubjectKeyIdentifier.oid:
                builder = builder.add_extension(one.value, one.critical)
        made = (
            builder.not_valid_before(now - day)
            .not_valid_after(now + left)
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


def test_keys_are_renewed_a_silo_is_added_another_revoked_and_no_round_is_lost(
    commands: Commands, tmp_path: Path
) -> None:
    """Under masks, where each silo sums with those of its own recipe and those that the authority says were added."""
    led = Led(commands, tmp_path)
    for name in NAMES:
        led.join(name)
    silos = {name: led.silo(name) for name in NAMES}
    led.until_round(2)

    before = {name: led.age(name) for name in ("north", "east", "trunk")}
    until(lambda: all(led.serial(name) != old for name, old in before.items()), "all keys to be renewed")

    led.add("late")
    led.join("late")
    silos["late"] = led.silo("late")
    until(lambda: any("late" in names for names in led.rounds().values()), "late to take part", command=silos["late"])
    first = min(number for number, names in led.rounds().items() if "late" in names)
    led.until_round(max(led.rounds()) + 3)

    commands.run("revoke", "south", "--authority", led.authority).succeeded()
    silos.pop("south").wait().failed("revoked on", "new invite")
    led.until_round(max(led.rounds()) + 5)
    assert all(one.process.is_running() for one in (*silos.values(), led.server))
    home = tmp_path / "south"
    commands.run("silo", home / "recipe.toml", "south", "--run-dir", home / "run").failed("revoked on")

    for one in (led.server, *silos.values()):  # else a round may end without the silos that are stopped first
        one.process.terminate()
        one.wait()
    found = led.rounds()
    last = max(number for number, names in found.items() if "south" in names)
    assert sorted(found) == list(range(1, len(found) + 1))
    for number, names in found.items():
        there = {
            name: (name != "late" or number >= first) and (name != "south" or number <= last) for name in led.names
        }
        assert names == sorted(name for name, is_there in there.items() if is_there)
    for name in ("north", "east", "west"):
        steps = steps_of(tmp_path / name / "run", name)
        whole = [one for one in steps if one[0] not in (last, last + 1)]  # these a lost sum may have begun twice
        expected = [(round, step) for round in range(1, steps[-1][0] + 1) for step in range(1, 5)]
        assert whole == [one for one in expected if one[0] not in (last, last + 1)][: len(whole)]


@pytest.mark.parametrize("shift", ["-3d", "+200d"])
def test_a_wrong_clock_is_named_and_the_invite_is_still_good(shift: str, commands: Commands, tmp_path: Path) -> None:
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("faketime is not installed")
    led = Led(commands, tmp_path)
    invite = AuthorityFolder(led.authority).invite("north")
    join = [sys.executable, "-m", "isthmus", "join", str(invite), "--folder", str(tmp_path / "n")]
    found = subprocess.run([faketime, "-f", shift, *join], capture_output=True, text=True)
    assert found.returncode == 1
    assert "by this machine's clock" in found.stderr
    assert "set the clock right" in found.stderr
    assert "ssl_transport_security" not in found.stderr
    join_federation(invite, tmp_path / "n")
