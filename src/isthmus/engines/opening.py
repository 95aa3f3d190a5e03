"""Opening a run: a silo with what was trained, connected to a trunk that serves the same round."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from isthmus.engines.chosen_round import chosen_round
from isthmus.engines.local import at_trunks, serving
from isthmus.engines.threads import set_threads
from isthmus.errors import IsthmusError, PeerGoneError, RunError
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, connect_silo, fetch_shared, keep_shared, load_data, load_shared
from isthmus.silo.secrets import open_ledger
from isthmus.silo.served import SharedAdapters, require_finished
from isthmus.storage.record import RunDirectory

WAIT_SECONDS = 2.0
"""Longest time to wait for a run that is just ending."""


def open_run(
    path: Path | str, name: str | None = None, *, trunk: str | None = None, round: str | int | None = None
) -> Silo:
    """A silo of a run, with the adapters of the last round that trunk and silo both have, or of another one.

    The run may be one of ``isthmus run``, whose trunk is then started as a child process, or a deployed silo's own
    folder, whose trunk is reached at the recipe's address. Releases are entered in the silo's ledger and charged to
    its privacy budget, as in training.

    Args:
        path: the run directory.
        name: the silo; None: the first in the recipe whose folder is here (``Silo.name`` says which).
        trunk: ``host:port`` of the trunk, in place of both; of several replicas, with commas between.
        round: ``best``, ``last``, or a number (see ``chosen_round.chosen_round``); None: the best of a recipe with
            ``train.evaluate = "best"``, else the last. A trunk that is not started here must serve it.

    Returns:
        The silo. A ``with`` block, or ``close``, ends the connection and the trunk process.

    Raises:
        RunError: the folder is no run directory, holds no such silo or no finished round, its run is still going on, or
            the trunk serves another round or another run.
        RecipeError: the recipe has no such silo.
        LedgerTakenError: another process, or an open silo, uses the silo's ledger.
        PeerGoneError: no trunk can be reached.
        IdentityError: a certificate is missing or unusable.
        ModelError: the model folder cannot be used.
        DataError: the recipe has a table ``sensitivity``, but the silo's rows are unusable.
    """
    run = RunDirectory.open(Path(path))
    name = _choose(run, name)
    recipe, number = run.recipe(), chosen_round(run, round) if run.silos() else None
    with ExitStack() as resources, ExitStack() as undo:
        if run.served_here and recipe.train.rounds:
            _require_round(run)
            resources.enter_context(run.locked(shared=True, seconds=WAIT_SECONDS))
        set_threads(recipe)
        directory = run.role(name)
        ledger = open_ledger(directory, recipe, name)
        resources.callback(ledger.close)
        if trunk is None and run.served_here:
            _, trunk = resources.enter_context(serving(run, number=number))
        recipe = at_trunks(recipe, trunk)
        own = recipe.of_silo(name, ranked=not run.served_here)
        released, records = directory.path / "released", directory.path / "records"
        try:
            silo = connect_silo(own, name, ledger=ledger, releases=released, records=records)
        except PeerGoneError as error:
            raise _no_trunk(recipe, error) from error
        undo.callback(silo.close)
        _load_trained(silo, own, run, number)
        if recipe.sensitivity is not None:
            load_data(recipe, name, silo)
        undo.pop_all()
        silo.resources = resources.pop_all()
    return silo


def _choose(run: RunDirectory, name: str | None) -> str:
    """The silo to open."""
    here = run.silos()
    if name is not None:
        run.recipe().party(name)
    if not here:
        raise RunError(
            f"{run.path} holds no silo's folder",
            remedy="name the --run-dir of 'isthmus silo', or let 'isthmus run' start; "
            "where trunk and root ran, 'isthmus trunk RUN_DIR' and 'isthmus export' use the result",
        )
    if name is not None and name not in here:
        raise RunError(f"{run.path} holds no folder of silo {name!r}", remedy=f"it holds: {', '.join(here)}")
    return name or here[0]


def _require_round(run: RunDirectory) -> None:
    if not run.completed():
        raise RunError(
            f"{run.path} holds no finished round: its model is still the base model",
            remedy="let the run finish a round first, with 'isthmus run --resume'",
        )


def _load_trained(silo: Silo, recipe: Recipe, run: RunDirectory, number: int | None) -> None:
    """Load the adapters of the round that the trunk serves: the run's own, else what the root has now.

    Args:
        number: the round that the trunk must serve; None: any.
    """
    welcome = silo.trunk.channel.welcome
    require_finished(welcome)
    if not welcome.completed and not recipe.train.rounds:  # the initial adapters are the right ones
        silo.served.set(welcome)
        return
    if not welcome.completed:
        raise RunError(
            "the trunk has no finished round", remedy="start it with the run directory in which the silos trained"
        )
    if number is not None and number != welcome.completed:
        raise RunError(
            f"the trunk serves round {welcome.completed}, not round {number}",
            remedy=f"start it with 'isthmus trunk RUN_DIR --round {number}', or take its round: --round last",
        )
    found = _saved(run, silo.name, welcome.completed)
    if found is None:
        try:
            found = fetch_shared(silo, recipe, None if run.served_here else run.role(silo.name))
        except IsthmusError as error:
            raise _other_round(run, silo.name, welcome.completed, error) from error
    load_shared(silo, found)
    if not run.served_here:
        keep_shared(run.role(silo.name), found)


def _saved(run: RunDirectory, name: str, number: int) -> SharedAdapters | None:
    """The adapters after this round: the root's if they are here, else those that the silo kept; None without both."""
    if number in run.role("root").rounds():
        state = run.role("root").load_round(number)
    elif number in run.role(name).shared.rounds():
        state = run.role(name).shared.load_round(number)
    else:
        return None
    return SharedAdapters(number, state.get("run", ""), state["shared"])


def _other_round(run: RunDirectory, name: str, number: int, error: IsthmusError) -> RunError:
    kept = sorted(run.role(name).shared.rounds())
    rounds = f"those of round {' and '.join(map(str, kept))}" if kept else "none"
    return RunError(
        f"the trunk serves round {number}; of adapters {name} has {rounds} in {run.path}, and the root gives none: "
        f"{error.message}",
        remedy="start the root or the edge, which has the others, or let the trunk serve an earlier round: "
        "'isthmus trunk RUN_DIR --round NUMBER'",
    )


def _no_trunk(recipe: Recipe, error: PeerGoneError) -> PeerGoneError:
    return PeerGoneError(
        error.message,
        remedy=f"start the trunk at {recipe.trunk.address} with 'isthmus trunk RUN_DIR', "
        'or give its address: trunk="host:port", --trunk host:port',
    )
