"""Generation goes on, token for token, when the trunk is killed in the middle of it and started again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address
from isthmus.privacy.noise import SeededNoise
from isthmus.recipe import Recipe
from isthmus.silo.join import Silo, join
from tests.integration.processes import Command, Commands, free_port, until, write_federation
from tests.oracle.twins import prompts

pytestmark = pytest.mark.process
LENGTH = 60
NOISE = 0.05


class Once(LogitsProcessor):
    """Does something once, after so many tokens."""

    def __init__(self, after: int, do: Callable[[], None]) -> None:
        self._left, self._do = after, do

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            self._do()
        return scores


class Trunk:
    """A trunk process at a fixed address."""

    def __init__(self, commands: Commands, recipe: Path) -> None:
        self._commands = commands
        self.recipe = recipe
        self._command: Command | None = None
        self.address = f"localhost:{free_port()}"

    def start(self) -> None:
        run = self.recipe.parent / "trunk"
        self._command = self._commands.start("trunk", self.recipe, "--run-dir", run, "--address", self.address)

    def kill(self) -> None:
        assert self._command is not None
        until(lambda: "listening" in self._command.stdout, "the trunk to listen", command=self._command)
        self._command.process.kill()
        self._command.wait()

    def kill_and_start(self) -> None:
        self.kill()
        self.start()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    folder = tmp_path_factory.mktemp("federation")
    commands = Commands(folder)
    recipe = write_federation(folder / "made", boundary={"forward": {"noise": NOISE}})
    make_certificates(Recipe.read(recipe), folder / "made" / "certificates")
    started = Trunk(commands, recipe)
    started.start()
    yield started
    commands.end()


@pytest.fixture
def silo(trunk: Trunk) -> Iterator[Silo]:
    joined = join(at_address(Recipe.read(trunk.recipe), trunk.address), "north")
    yield joined
    joined.close()


def answer(silo: Silo, *processors: LogitsProcessor, **settings: Any) -> torch.Tensor:
    """Generated with the same noise each time: a frame sent again must be the one that was sent before."""
    silo.boundary._noise = SeededNoise(torch.Generator().manual_seed(3))
    return silo.model.generate(
        **prompts((9, 30, 17)),
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
        **settings,
    )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_killed_trunk_costs_no_token(settings: dict[str, Any], trunk: Trunk, silo: Silo) -> None:
    undisturbed = answer(silo, **settings)
    released = silo.boundary.released_bytes["forward"]
    after = random.Random(0).randrange(2, LENGTH)
    assert torch.equal(answer(silo, Once(after, trunk.kill_and_start), **settings), undisturbed)
    assert silo.boundary.released_bytes["forward"] == 2 * released, "nothing was released twice"
