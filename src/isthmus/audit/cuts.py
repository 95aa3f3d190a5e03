"""The command ``isthmus cut``: measures cuts, each in a fresh process, and chooses one; and the cut of a recipe that
leaves it to a measurement (``model.cut = "auto"``)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.audit.extra import require_extra
from isthmus.engines.cuts import (
    CutChoice,
    CutFigures,
    CutLimits,
    Link,
    averaging,
    candidate_cuts,
    choose_cut,
    measured_link,
)
from isthmus.engines.fresh import in_fresh_process
from isthmus.engines.memory import free_memory
from isthmus.errors import AttackError, CutError, RecipeError
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.storage.files import writing

CHEAP_ATTACKS = ("linear",)
"""The attacks by default: the linear inverter is in closed form, and reads nearly all at shallow cuts."""
CUT_ATTACKS = ("linear", "matching", "transformer")
"""Attacks that can be asked for."""
TABLE_LINE = re.compile(r"^\s*\[\[?(?P<table>[^\[\]]+)\]\]?\s*(#.*)?$")
CUT_LINE = re.compile(r"^\s*(cut|bottom|top)\s*=")


@dataclass(frozen=True)
class CutPlan:
    """What is measured, and what a cut must keep to."""

    silo: str | None = None
    """The silo; None: the recipe's first."""
    cuts: tuple[str, ...] = ()
    """Cuts as ``A,C``; none: ``engines.cuts.CUTS``."""
    rows: int | None = None
    """Rows that are attacked (see ``audit.cut_probe.probe_cut``)."""
    attacks: tuple[str, ...] = CHEAP_ATTACKS
    """Names from ``CUT_ATTACKS``."""
    memory: float | None = None
    """Most bytes of the silo's process; None: what is free here."""
    leakage: float | None = None
    """Largest share of tokens recovered; None: ``model.leakage``."""
    rtt: float | None = None
    """Seconds of a round trip; None: measured to the recipe's trunk, if it can be reached."""
    bandwidth: float | None = None
    """Bytes a second of the link; None: not known."""
    trunk: bool = True
    """Measure the trunk's part here, too."""
    own: bool = False
    """Choose a cut for this silo alone (``silo.bottom``, ``silo.top``), beside the recipe's for the others."""


def measure_cuts(recipe: Recipe, plan: CutPlan, notify: Callable[[str], None]) -> CutChoice:
    """Measure the plan's cuts on this machine and choose one.

    Args:
        notify: called with messages about the progress.

    Raises:
        CutError: a cut does not fit the model, none keeps to the limits, or a limit is no number.
        AttackError: an unknown attack, too few rows, or a package for attacks is missing.
        IsthmusError: the model, the silo's rows or its device cannot be used.
    """
    name = recipe.party(plan.silo or recipe.silo[0].name).name
    for key in ("memory", "leakage", "rtt", "bandwidth"):
        if not math.isfinite(getattr(plan, key) or 0.0):
            raise CutError(f"--{key} is not finite", remedy="give a number, or leave it out")
    if unknown := [one for one in plan.attacks if one not in CUT_ATTACKS]:
        raise AttackError(f"there is no attack {unknown[0]!r} of cuts", remedy=f"use one of: {', '.join(CUT_ATTACKS)}")
    require_extra()
    config = Checkpoint(recipe.model.path).config.get_text_config()
    cuts = candidate_cuts(plan.cuts, config.num_hidden_layers)
    if plan.own:
        cuts = _own_cuts(recipe, cuts)
    leakage = recipe.model.leakage if plan.leakage is None else plan.leakage
    limits = CutLimits(_free(recipe, name) if plan.memory is None else plan.memory, leakage)
    link = measured_link(recipe.trunk.address, plan.rtt, plan.bandwidth)
    figures = []
    for bottom, top in cuts:
        notify(f"measuring the cut ({bottom}, {top})")
        figures.append(_measured(_whole_cut(recipe, bottom, top), name, plan))
    choice = choose_cut(name, figures, link, limits)
    if recipe.train.epochs is not None:  # how long a round is follows from each silo's rows
        return choice
    steps = recipe.party(name).steps or recipe.train.steps
    return replace(choice, averaging=averaging(choice.chosen, link, steps))


def cut_for_run(recipe: Recipe, notify: Callable[[str], None]) -> CutChoice:
    """The cut for a run on this machine of a recipe that leaves it to a measurement.

    All silos and the trunk run here together: each may take an equal part of the free memory. The first silo is
    measured, without a link, and attacked only if ``model.leakage`` limits what may be recovered.

    Raises:
        IsthmusError: as ``measure_cuts``.
    """
    share = free_memory() // (len(recipe.silo) + 1)
    rows = None if recipe.model.leakage is not None else 0
    choice = measure_cuts(recipe, CutPlan(memory=share, rtt=0.0, rows=rows), notify)
    return replace(choice, link=Link(0.0, None, "none: all parties run on this machine"), averaging=None)


def write_cut(path: Path, bottom: int, top: int, silo: str | None = None) -> None:
    """State this cut in a recipe's file. Only the keys ``cut``, ``bottom`` and ``top`` of one table change.

    Args:
        silo: the silo that alone gets it, in its own table; None: all, in ``[model]``.

    Raises:
        RecipeError: the file is a run's own, the table is not written line by line, or the silo has no such cut.
    """
    path = path.resolve()
    before = Recipe.read(path, undecided=True)
    name, number = ("model", 1) if silo is None else ("silo", [one.name for one in before.silo].index(silo) + 1)
    text = path.read_bytes().decode("utf-8-sig")
    lines, inside, count = [], False, 0
    for line in text.splitlines(keepends=True):
        if header := TABLE_LINE.match(line):
            count += header["table"].strip() == name
            inside = header["table"].strip() == name and count == number
        if inside and CUT_LINE.match(line):
            continue
        lines.append(line if line.endswith("\n") else f"{line}\n")
        if header and inside:
            lines += [f"bottom = {bottom}\n", f"top = {top}\n"]
    with (
        _by_hand(path, bottom, top, f"[{name}]" if silo is None else f"[[silo]] of {silo}"),
        writing(path) as temporary,
    ):
        temporary.write_text("".join(lines), encoding="utf-8", newline="")
        temporary.chmod(path.stat().st_mode)
        after = Recipe.read(temporary, undecided=silo is not None)
        if after.model_dump() != _with_cut(before, bottom, top, silo).model_dump():
            raise RecipeError("its table is not written line by line", remedy="")


@contextmanager
def _by_hand(path: Path, bottom: int, top: int, table: str) -> Iterator[None]:
    try:
        yield
    except RecipeError as error:
        raise RecipeError(
            f"the cut cannot be written to {path}: {error.message}",
            remedy=f"write it by hand: in {table} bottom = {bottom} and top = {top}, in [model] no cut",
        ) from error


def _with_cut(recipe: Recipe, bottom: int, top: int, silo: str | None) -> Recipe:
    """The recipe with this cut for all silos that have none of their own, or for one silo alone."""
    if silo is None:
        return recipe.with_cut(bottom, top)
    own = {"bottom": bottom, "top": top}
    silos = tuple(one.model_copy(update=own) if one.name == silo else one for one in recipe.silo)
    return recipe.model_copy(update={"silo": silos})


def _whole_cut(recipe: Recipe, bottom: int, top: int) -> Recipe:
    """The recipe with this cut for all silos, also for those that have their own."""
    silos = tuple(one.model_copy(update={"bottom": None, "top": None}) for one in recipe.silo)
    return recipe.with_cut(bottom, top).model_copy(update={"silo": silos})


def _own_cuts(recipe: Recipe, cuts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the cuts that a silo may have beside the recipe's.

    Raises:
        CutError: there is none.
    """
    recipe.require_cut()
    least = recipe.model.bottom, recipe.model.top
    found = [cut for cut in cuts if cut[0] >= least[0] and cut[1] >= least[1]]
    if not found:
        raise CutError(
            f"no cut leaves a silo the {least[0]} blocks at the bottom and {least[1]} at the top that the trunk lacks",
            remedy="name larger cuts with --cuts, or choose a smaller one for all without --own",
        )
    return found


def _free(recipe: Recipe, name: str) -> int:
    """Bytes that are free for this silo: of its CUDA device, or of the machine."""
    from isthmus.model.device import find_device

    device = find_device(recipe.party(name).device)
    if device.type != "cuda":
        return free_memory()
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _measured(recipe: Recipe, name: str, plan: CutPlan) -> CutFigures:
    """The figures of the recipe's cut; as many as there were when its process was ended for want of memory."""
    from isthmus.audit.cut_probe import probe_cut

    found = CutFigures(recipe.model.bottom, recipe.model.top)
    for figures in in_fresh_process(probe_cut, recipe, name, plan.rows, plan.attacks, plan.trunk):
        found = figures
    return found
