"""A disk that rots: whatever bit of a saved file flips, no other values are loaded; a run goes on from good rounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from isthmus.errors import IsthmusError, RunError
from isthmus.federation.planner import RootPlanner
from isthmus.model import digests
from isthmus.privacy.events import Charge, Release
from isthmus.privacy.ledger import FileLedger, head_of, read_ledger
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import SensitivitySection
from isthmus.silo.join import SharedAdapters, keep_shared
from isthmus.silo.records import Records
from isthmus.silo.secrets import open_ledger, read_secret
from isthmus.storage.journal import Journal, read_journal
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.storage.store import Store
from isthmus.trunk.service import run_name
from isthmus.wire.authority import Authority
from isthmus.wire.identity import Identity, save_identity
from tests.conftest import make_recipe

FLIPS, CUTS = 100, 30
Kind = Callable[[Path], tuple[Path, Callable[[], object]]]
"""Writes a file; gives its path, and what reads it."""


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def saved_round(folder: Path) -> tuple[Path, Callable[[], object]]:
    RoleDirectory(folder).save_round(3, {"w": torch.arange(40.0), "run": "name"})
    return folder / "rounds" / "round-0003.pt", lambda: str(RoleDirectory(folder).load_round(3))


def stored(folder: Path) -> tuple[Path, Callable[[], object]]:
    Store(folder).write(7, bytes(range(100)))
    return folder / f"{7:016x}", lambda: Store(folder).read(7)


def key(folder: Path) -> tuple[Path, Callable[[], object]]:
    read_secret(folder / "record-key")
    return folder / "record-key", lambda: read_secret(folder / "record-key")


def name(folder: Path) -> tuple[Path, Callable[[], object]]:
    run_name(RoleDirectory(folder))
    return folder / "run", lambda: run_name(RoleDirectory(folder))


def ledger(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "ledger.jsonl"
    written = FileLedger(path, silo="a")
    for number in range(4):
        written.record(Release("update", number, 1, 8, 1.0, 2.0, 32, charges=(Charge("ann", 0.5),)))
    written.close()
    return path, lambda: list(read_ledger(path).releases())


def head(folder: Path) -> tuple[Path, Callable[[], object]]:
    path, load = ledger(folder)
    return head_of(path), load


def journal(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "metrics.jsonl"
    for number in range(4):
        Journal(path).append({"round": number, "loss": 0.125 * number, "silos": ["a", "b"]})
    return path, lambda: read_journal(path)


def recipe(folder: Path) -> tuple[Path, Callable[[], object]]:
    made = make_recipe(Path("/models/tiny"), silos=("a", "b"))
    run = RunDirectory.create(folder, made)
    return run.recipe_path, run.recipe


def cached_digests(folder: Path) -> tuple[Path, Callable[[], object]]:
    digests._keep("model.safetensors", (1, 2, 3), {"w": "0123"})
    (path,) = folder.rglob("*.json")
    return path, lambda: digests._cached("model.safetensors", (1, 2, 3))


def scale(folder: Path) -> tuple[Path, Callable[[], object]]:
    section = SensitivitySection.model_validate({"detectors": ["email"], "classes": {"high": {"noise": 2.0}}})
    Records(folder, Sensitivity(section), str)._write_scale(1.25)
    return folder / "sensitivity.json", lambda: Records(folder, Sensitivity(section), str)._scale


def identity(file: str) -> Kind:
    def kind(folder: Path) -> tuple[Path, Callable[[], object]]:
        save_identity(Authority().issue("a"), folder)
        return folder / "a" / file, lambda: parsed(Identity.load(folder, "a", "silo"))

    return kind


def parsed(one: Identity) -> object:
    """What of an identity is used, whatever else stands in its files."""
    key = serialization.load_pem_private_key(one.key, None)
    issuer, certificate = (x509.load_pem_x509_certificate(text) for text in (one.authority, one.certificate))
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return [issuer.subject, issuer.public_key(), certificate.tbs_certificate_bytes, private]


KINDS: dict[str, Kind] = {
    **{kind.__name__: kind for kind in (saved_round, stored, key, name, ledger, head, journal, recipe)},
    **{kind.__name__: kind for kind in (cached_digests, scale)},
    **{file: identity(file) for file in ("ca.pem", "cert.pem", "key.pem")},
}
"""The kinds of files that roles write and read again. Drafts are in ``unit/silo/drafting/test_draft_file.py``; results
for people (``attack.json``, ``demo.json``) and exported adapters have no checksum."""


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_and_no_cut_loads_other_values(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,300 random flips and 390 cuts over all kinds of files. What is loaded is what was saved, or nothing is; of a
    journal, whose end is not marked, the first lines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "folder"))
    path, load = KINDS[kind](tmp_path / "folder")
    whole, value, draw = path.read_bytes(), load(), random.Random(0)
    messages: set[bool] = set()
    for number in range(FLIPS + CUTS):
        if number < FLIPS:
            flip(path, draw.randrange(8 * len(whole)))
        else:
            path.write_bytes(whole[: draw.randrange(len(whole))])
        try:
            loaded = load()
        except IsthmusError as error:
            loaded = None
            messages.add(bool(error.message and error.remedy))
        if kind == "journal" and isinstance(loaded, list):
            assert isinstance(value, list)
            assert loaded == value[: len(loaded)]
        else:
            assert loaded in (value, None)
        path.write_bytes(whole)
    assert False not in messages


def test_a_cut_round_is_refused_by_name_and_passed_over_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RoleDirectory(tmp_path).save_round(2, {"w": torch.zeros(1)})
    path, load = saved_round(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"round-0003\.pt.*damaged or cut off"):
        load()
    assert RoleDirectory(tmp_path).last_round() == 2
    assert "round-0003.pt is passed over" in caplog.text
    assert "going on from round 2" in caplog.text


def test_trunk_and_root_go_back_to_a_round_that_both_can_read(tmp_path: Path) -> None:
    """The trunk's round 4 is damaged, and the root's round 3: both go on from round 2."""
    run = RunDirectory.create(tmp_path / "run", make_recipe(Path("/models/tiny"), silos=("a", "b")))
    for role in ("trunk", "root"):
        for number in range(1, 5):
            run.role(role).save_round(number, {"shared": {"w": torch.full((1,), float(number))}})
    flip(run.path / "trunk/rounds/round-0004.pt", 999)
    flip(run.path / "root/rounds/round-0003.pt", 999)
    assert run.completed() == 2
    root = run.role("root")
    root.until = run.completed()
    planner = RootPlanner(run.recipe(), {"w": torch.zeros(1)}, root)
    assert planner.completed == 2
    assert planner.shared["w"].item() == 2
    for role in ("trunk", "root"):
        run.role(role).save_round(3, {"shared": {}})
    run.role("trunk").save_round(4, {})
    assert run.completed() == 3, "the root's old round 4 does not follow from its new round 3"


def test_a_round_that_is_trained_again_is_kept_again(tmp_path: Path) -> None:
    silo = RoleDirectory(tmp_path)
    for value in (1.0, 2.0):
        keep_shared(silo, SharedAdapters(4, "run", {"w": torch.full((1,), value)}))
    assert silo.shared.load_round(4)["shared"]["w"].item() == 2


def test_the_disk_is_bounded_by_the_rounds_that_are_kept(tmp_path: Path) -> None:
    """Round 0, by which a run's start is checked, stays; with two rounds kept a damaged one leaves a good one."""
    role = RoleDirectory(tmp_path)
    role.keep = 2
    for number in range(50):
        role.save_round(number, {"w": torch.full((1,), float(number))})
    assert role.rounds() == {0, 48, 49}
    flip(tmp_path / "rounds/round-0049.pt", 999)
    assert RoleDirectory(tmp_path).last_round() == 48


def test_a_damaged_line_of_a_journal_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for number in range(3):
        journal.append({"n": number})
    flip(tmp_path / "metrics.jsonl", 8 * 30 + 7)
    with pytest.raises(RunError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_journal(tmp_path / "metrics.jsonl")


def test_what_a_role_writes_is_for_its_owner_alone(tmp_path: Path) -> None:
    role = RoleDirectory(tmp_path / "run" / "silos" / "a")
    open_ledger(role, make_recipe(Path("/models/tiny"), silos=("a", "b")), "a").close()
    role.save_round(1, {"w": torch.zeros(1)})
    role.shared.save_round(1, {"w": torch.zeros(1)})
    role.journal("metrics").append({"n": 1})
    Store(role.path / "released").write(1, b"states")
    read_secret(role.path / "records" / "record-key")
    run_name(role)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
