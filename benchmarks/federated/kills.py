"""SIGKILL of each role before each of its writes and changes of state: how many federations recover by themselves.

``make bench-kills``. Roles are real processes that a service manager would start again (``tests/hostile/killed.py``).
A federation has recovered if all its silos finish, with the same adapters, optimizers and shared tensors as without a
kill, and with ledgers and journals that can be read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common.results import Results
from tests.hostile.killed import assert_whole, federate, masked, plain


def main() -> None:
    results = Results("kills", "make bench-kills")
    kills = recovered = 0
    with tempfile.TemporaryDirectory() as temporary:
        for make, roles in ((plain, ("trunk", "root", "north")), (masked, ("ward", "west"))):
            place = Path(temporary) / make.__name__
            recipe = make(place)
            for role in roles:
                undisturbed = _folder(place / role)
                events = federate(recipe, undisturbed, role, None).events
                good = 0
                for at in range(1, events + 1):
                    folder = _folder(place / f"{role}-{at}")
                    outcome = federate(recipe, folder, role, at)
                    if outcome.finished and not outcome.killed:
                        continue  # what the others do decides about some lines of the log
                    kills += 1
                    try:
                        assert outcome.finished, "it did not finish"
                        assert_whole(recipe, folder, undisturbed)
                        good += 1
                    except AssertionError as error:
                        print(f"{make.__name__} {role} at {at}: {str(error)[:300]}", flush=True)
                        for log in sorted(folder.glob("*.log")):
                            print(f"--- {log.name}\n{log.read_text()[-1500:]}", flush=True)
                recovered += good
                results.add(f"{make.__name__}: recovered kills of {role}", good, "federations")
        results.add("kills before a write or a change of state, all roles", kills, "federations", at_least=100)
        results.add("recovered to the same result without a human", 100 * recovered / kills, "%", at_least=100.0)
    print(f"written: {results.write()}")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
