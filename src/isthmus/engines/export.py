"""The adapter of a run as a PEFT folder."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.engines.chosen_round import chosen_round
from isthmus.errors import RunError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.storage.files import disk_errors
from isthmus.storage.record import ROLES, RunDirectory


def export_adapter(run: RunDirectory, out: Path, round: str | int | None = None) -> int:
    """Write the adapter of bottom, trunk and top as one PEFT folder for the uncut model.

    Args:
        round: as in ``opening.open_run``.

    Returns:
        The number of finished rounds behind the adapter.

    Raises:
        RunError: the run has no finished round, its last one is damaged, or it trained tensors that the
            uncut model does not have.
    """
    recipe = run.recipe()
    boundary = recipe.boundary
    if boundary.width is not None or boundary.residual or boundary.denoise or boundary.tail is not None:
        raise RunError(
            "with boundary.tail, width, residual or denoise no adapter of the uncut model equals what was trained",
            remedy="use the run as it is, with 'isthmus generate'",
        )
    _require_both(run)
    number, tensors = final_adapter(run, chosen_round(run, round))
    with disk_errors(out):
        adapters.write_adapter(out, tensors, recipe.lora, recipe.model.path)
    return number


def final_adapter(run: RunDirectory, number: int | None = None) -> tuple[int, dict[str, torch.Tensor]]:
    """A round that both trunk and root have saved, and its adapter tensors by uncut name.

    Args:
        number: the round; None: the last.

    Raises:
        RunError: the run has no finished round, its last one is damaged, or
            the folder lacks the adapters of trunk or root.
    """
    trunk, root = run.role("trunk"), run.role("root")
    _require_both(run)
    if number is None:
        number = min(max(one.rounds(), default=0) for one in (trunk, root))  # a damaged one is refused, not passed over
    if number == 0:
        raise RunError(f"{run.path} holds no finished round", remedy="let the run finish a round first")
    recipe = run.recipe()
    frozen = adapters.initial_tensors(Checkpoint(recipe.model.path).config, recipe)
    return number, {**frozen, **trunk.load_round(number)["adapter"], **root.load_round(number)["shared"]}


def _require_both(run: RunDirectory) -> None:
    """Check that a party's own folder has what an adapter of the whole model takes.

    Raises:
        RunError: roles have run here, but the trunk or the root is not among them.
    """
    absent = [role for role in ("trunk", "root") if not run.role(role).path.is_dir()]
    if absent and any((run.path / role).is_dir() for role in ROLES):
        what = {"trunk": "the trunk's adapter (trunk/rounds)", "root": "that of the ends (root/rounds)"}
        raise RunError(
            f"{run.path} lacks {' and '.join(what[role] for role in absent)}",
            remedy="export where both trunk and root ran, or copy their run directories into one folder first",
        )
