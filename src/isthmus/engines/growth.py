"""Silos that are added to the recipe of a federation that is running: its server takes them up between two rounds."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future

from isthmus.engines.local import at_address
from isthmus.errors import IsthmusError, RecipeError
from isthmus.federation.aggregator import GreetedAggregator
from isthmus.joining.authority_folder import AuthorityFolder
from isthmus.joining.keeper import REMOTE_SECONDS
from isthmus.recipe import Recipe
from isthmus.recipe.shared import shared_keys, without_silos

ROSTER_SECONDS = 2.5 * REMOTE_SECONDS
"""Time in which silos under masks learn who is added, before it takes part."""
log = logging.getLogger(__name__)


class Growth:
    """Watches the recipe's file for silos that it did not have.

    Args:
        recipe: as it is served.
        authority: whose recipe it is.
        address: ``host:port`` at which it is served.
    """

    def __init__(self, recipe: Recipe, authority: AuthorityFolder, address: str) -> None:
        self.recipe = recipe
        """With the silos that were added, once ``due``."""
        self._authority, self._address = authority, address
        self._state = self._written()
        self._found: Recipe | None = None
        self._since = 0.0
        self._held: Future[None] | None = None

    def due(self, aggregator: GreetedAggregator) -> bool:
        """Whether silos were added, and no round is under way: from then on none begins.

        Args:
            aggregator: the root.
        """
        if (state := self._written()) != self._state:
            self._state = state
            self._look()
        wait = ROSTER_SECONDS if self.recipe.federation.secure.masks else 0.0
        if self._found is None or time.monotonic() < self._since + wait:
            return False
        self._held = self._held or aggregator.hold()
        if not self._held.done():
            return False
        self.recipe = self._found
        return True

    def _look(self) -> None:
        try:
            found = Recipe.read(self._authority.recipe_path)
            added = set(found.tree.silos) - set(self.recipe.tree.silos)
            if not added:
                return
            check_growth(self.recipe, found)
        except IsthmusError as error:
            log.warning("%s was changed; it is not taken up: %s", self._authority.recipe_path, error)
            return
        log.info("added to the recipe: %s; after this round they take part", ", ".join(sorted(added)))
        self._found, self._since = at_address(found, self._address), time.monotonic()

    def _written(self) -> int:
        try:
            return self._authority.recipe_path.stat().st_mtime_ns
        except OSError:
            return 0


def check_growth(before: Recipe, after: Recipe) -> None:
    """Check that a recipe adds silos to another, behind those that it has, changes nothing else that all parties must
    have alike, and that what the others do does not depend on how many they are.

    Raises:
        RecipeError: it does not.
    """
    own = {
        "edges": bool(after.edge),
        "federation.asynchronous": after.federation.asynchronous.buffer is not None,
        "federation.control": after.federation.control != "none",
        "federation.normalized": after.federation.normalized,
        "federation.noise": after.federation.noise is not None,
        "federation.between": after.trains_between,
        "model.moves": bool(after.model.moves),
    }
    if reasons := [key for key, there in own.items() if there]:
        raise RecipeError(
            f"silos cannot be added while a federation with {reasons[0]} runs",
            remedy="give all parties the new recipe and start them again; the run goes on",
        )
    names, known = [one.name for one in after.silo], [one.name for one in before.silo]
    if names[: len(known)] != known:
        raise RecipeError(
            "silos were removed, or added before others", remedy="add tables [[silo]] at the end; revoke who leaves"
        )
    theirs, own_keys = without_silos(shared_keys(after), names, names[len(known) :]), shared_keys(before)
    if differing := sorted(key for key in {*theirs, *own_keys} if theirs.get(key) != own_keys.get(key)):
        raise RecipeError(
            f"it changes {differing[0]}, too, which all parties must have alike",
            remedy="change it back, or give all parties the new recipe and start them again",
        )
