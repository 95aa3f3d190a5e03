"""A federation that its leader ends before its last round."""

from __future__ import annotations

from isthmus.errors import RunError
from isthmus.storage.record import RunDirectory


def end_early(run: RunDirectory) -> int:
    """Ask the root that runs in this directory to end the federation. It drops the round under way, and answers every
    silo that asks for the next one that none is left.

    Returns:
        Number of rounds that are finished.

    Raises:
        RunError: no root runs here, or no round is left.
    """
    root = run.role("root")
    completed, rounds = max(root.rounds(), default=0), run.recipe().train.rounds
    if completed >= rounds:
        raise RunError(f"no round is left: {completed} of {rounds} are finished", remedy="nothing is to be done")
    if not root.path.is_dir() or not _root_runs(run):
        raise RunError(
            f"no root runs in {run.path}",
            remedy="name the run directory of 'isthmus run', 'isthmus trunk --with-root' or 'isthmus root' as it runs",
        )
    root.end_early()
    return completed


def _root_runs(run: RunDirectory) -> bool:
    """Whether a process has the root's lock, or an engine the directory's."""
    try:
        with run.locked(shared=True, seconds=0.0), run.locked(role="root", seconds=0.0):
            return False
    except RunError:
        return True
