"""What root and trunk tell one another of blocks between: the trunk's service does as the protocol says."""

from __future__ import annotations

import inspect

from isthmus.trunk.service import TrunkService
from isthmus.updates.between import TrunkBlocks


def test_the_trunks_service_is_what_the_root_asks() -> None:
    for name in ("trained", "settle"):
        asked, answers = getattr(TrunkBlocks, name), getattr(TrunkService, name)
        assert inspect.signature(asked) == inspect.signature(answers)
