"""A trunk over several processes that torchrun starts: rank 0 serves, the others hold some of its blocks.

``torchrun --nproc-per-node 2 -m isthmus trunk recipe.toml``. What a rank sends another is neither encrypted nor
authenticated: the ranks must be on one machine or on a private network.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented, and not in its __all__
from torch.distributed.rendezvous import rendezvous

from isthmus.engines.lifetime import Stopped
from isthmus.engines.rank_place import RankPlace
from isthmus.engines.threads import set_threads
from isthmus.errors import IsthmusError, MismatchError, RankLostError, RecipeError
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut
from isthmus.model.device import find_device
from isthmus.model.share import BlockShare
from isthmus.recipe import Recipe
from isthmus.recipe.shared import check_shared, shared_keys
from isthmus.storage.record import RunDirectory
from isthmus.trunk.ranks import UNBOUNDED, AnswersOrders, Ranks, follow, give, take
from isthmus.trunk.stage import load_stage

log = logging.getLogger(__name__)
RENDEZVOUS_SECONDS = 300.0
"""Longest time that ranks wait for one another at the start."""
PARTING_SECONDS = 20.0
"""Time that a rank which is asked to end waits for rank 0 to end; torchrun kills after 30."""


@contextmanager
def leading(place: RankPlace | None, path: Path) -> Iterator[Ranks | None]:
    """Rank 0: the others hold their shares while the block runs, and end with it.

    Args:
        place: None: there are no others.
        path: the recipe, or the run directory of a finished run.

    Raises:
        MismatchError: another rank has another model, recipe or kind of device; all ranks raise it.
        RankLostError: one is gone; so too where the block only was asked to stop.
        RecipeError: the recipe is not for several ranks.
    """
    if place is None:
        yield None
        return
    recipe = _recipe_at(path)
    with _connected(place, recipe):
        _agree(place, _statement(recipe, place))
        ranks = Ranks(place.ranks)
        try:
            yield ranks
        finally:
            ranks.end()
    ranks.check()


def follow_rank_0(place: RankPlace, path: Path) -> None:
    """Another rank: hold some of the blocks and compute with them, until rank 0 ends.

    Args:
        path: as in ``leading``; on this rank's machine.

    Raises:
        MismatchError, RecipeError: as ``leading``.
        RankLostError: rank 0 is gone.
        ModelError: this rank's model folder cannot be used.
        NotSupportedError: there are more ranks than blocks, or the recipe's weights are not for this device.
    """
    recipe = _recipe_at(path)
    set_threads(recipe)
    with _connected(place, recipe):
        _agree(place, _statement(recipe, place))
        log.info("rank %d of %d is connected with rank 0", place.rank, place.ranks)
        device, checkpoint = device_of(place, recipe), Checkpoint(recipe.model.path)
        share = BlockShare(place.rank, place.ranks)

        def load(cut: Cut) -> AnswersOrders:
            return load_stage(checkpoint, recipe, device, share, cut).answer

        _Following(partial(follow, load, device)).wait()


class _Following:
    """Does what rank 0 asks for. It is no work of the main thread, which could not be asked to stop while it waits."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._over = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Wait for rank 0's end; where this rank is asked to end, too, for ``PARTING_SECONDS``. Raises the work's
        error."""
        threading.Thread(target=self._run, name="rank", daemon=True).start()
        try:
            self._over.wait()  # a thread that is joined counts as ended once a signal interrupts that
        except Stopped:
            self._over.wait(PARTING_SECONDS)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()


@contextmanager
def _connected(place: RankPlace, recipe: Recipe) -> Iterator[None]:
    """Within the block torch.distributed connects all ranks: processors by gloo, CUDA devices by NCCL.

    Raises:
        RecipeError: the recipe is not for several ranks.
        RankLostError: not all ranks have come.
    """
    device = device_of(place, recipe)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    patience = timedelta(seconds=RENDEZVOUS_SECONDS)
    try:
        store, rank, ranks = next(rendezvous("env://", timeout=patience))
        store = PrefixStore(f"isthmus/{place.attempt}", store)  # torchrun's may hold addresses of earlier attempts
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    except RuntimeError as error:
        raise RankLostError(
            f"rank {place.rank} has not reached all {place.ranks} ranks: {str(error).partition(chr(10))[0]}",
            remedy="start all ranks by torchrun with one rendezvous; between machines, GLOO_SOCKET_IFNAME names the "
            "network that they share",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_of(place: RankPlace, recipe: Recipe) -> torch.device:
    """Where a rank computes: on the processor, or on the CUDA device of its number on this machine.

    Raises:
        RecipeError: ``trunk.device`` names one device for all, or there are too few.
    """
    device = find_device(recipe.trunk.device)
    if device.type == "cpu":
        return device
    if ":" in recipe.trunk.device:
        raise RecipeError(
            f"trunk.device = {recipe.trunk.device!r} names one device, and each rank has its own",
            remedy='set trunk.device = "cuda", and CUDA_VISIBLE_DEVICES for the choice',
        )
    if place.local >= torch.cuda.device_count():
        raise RecipeError(
            f"rank {place.rank} would have CUDA device {place.local}, and there are {torch.cuda.device_count()} here",
            remedy="start as many ranks on a machine as it has devices (torchrun --nproc-per-node)",
        )
    return torch.device("cuda", place.local)


def _recipe_at(path: Path) -> Recipe:
    """The recipe, or that of a finished run's directory."""
    return RunDirectory.open(path).recipe() if path.is_dir() else Recipe.read(path)


def _statement(recipe: Recipe, place: RankPlace) -> dict[str, Any]:
    """What all ranks must have alike."""
    fingerprint = Checkpoint(recipe.model.path).fingerprint
    return {"fingerprint": fingerprint, "device": device_of(place, recipe).type, "keys": shared_keys(recipe)}


def _agree(place: RankPlace, own: Mapping[str, Any]) -> None:
    """Compare what each rank has with what rank 0 has.

    Raises:
        MismatchError: one differs; on all ranks.
    """
    if place.rank:
        give(0, own)
        refusal = take(0, UNBOUNDED)[0]["refusal"]
    else:
        others = range(1, place.ranks)
        found = [_difference(f"rank {rank}", take(rank, UNBOUNDED)[0], own) for rank in others]
        refusal = next((one for one in found if one is not None), None)
        for rank in others:
            give(rank, {"refusal": refusal})
    if refusal is not None:
        message, remedy = refusal
        raise MismatchError(message, remedy=remedy)


def _difference(rank: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str] | None:
    """What differs between a rank and rank 0, and what to do about it; None: nothing."""
    if theirs["fingerprint"] != own["fingerprint"]:
        message = f"{rank} and rank 0 have different base models (configuration or weights differ)"
        return message, "give all ranks the same files at model.path"
    if theirs["device"] != own["device"]:
        message = f"{rank} computes on {theirs['device']}, rank 0 on {own['device']}"
        return message, 'set trunk.device to "cpu" or to "cuda" for all ranks'
    try:
        check_shared(rank, theirs["keys"], "rank 0", own["keys"])
    except IsthmusError as error:
        return error.message, error.remedy
    return None
