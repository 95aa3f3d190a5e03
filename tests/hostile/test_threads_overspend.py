"""Threads that release at once neither overspend a budget nor break the ledger's chain."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from isthmus.errors import BudgetExhausted
from isthmus.privacy.accountant import Account
from isthmus.privacy.budget import Budget
from isthmus.privacy.events import Charge, Release
from isthmus.privacy.ledger import FileLedger, read_ledger
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection, PrivacySection, ReleaseSection
from isthmus.silo.boundary import Boundary

ALLOWED, TRIED = 30, 120


def test_eight_threads_stay_within_a_budget_of_thirty(tmp_path: Path) -> None:
    allowed = Account().plus(Charge("a", (ALLOWED + 0.5) * (2 / 4.0) ** 2)).epsilon(1e-5).value
    ledger = FileLedger(tmp_path / "ledger.jsonl", silo="a")
    section = BoundarySection(forward=ReleaseSection(clip=1.0, noise=4.0))
    boundary = Boundary(section, ledger, budget=Budget(PrivacySection(record_epsilon=allowed)))

    def release(step: int) -> bool:
        try:
            boundary.release(torch.ones(1, 8), "forward", step, Subjects(("a",), (1,)))
        except BudgetExhausted:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(release, range(TRIED))) == ALLOWED
    ledger.close()
    assert len(list(read_ledger(tmp_path / "ledger.jsonl").releases())) == ALLOWED


def test_threads_that_write_to_one_ledger_keep_its_chain(tmp_path: Path) -> None:
    ledger = FileLedger(tmp_path / "ledger.jsonl", silo="a")

    def record(step: int) -> None:
        ledger.record(Release("forward", step, 1, 8, 1.0, 4.0, 32, charges=(Charge("a", 0.25),)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(record, range(200)))
    ledger.close()
    assert sorted(one.step for one in read_ledger(tmp_path / "ledger.jsonl").releases()) == list(range(200))
    FileLedger(tmp_path / "ledger.jsonl", silo="a", begun=True).close()
