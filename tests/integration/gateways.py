"""Gateways as real processes, over runs whose tiny model has a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI

from isthmus.recipe import Recipe
from tests.integration.processes import Command, Commands, run_here, write_federation

TEMPLATE = (
    "{% for turn in messages %}{{ {'system': 'w90', 'user': 'w91', 'assistant': 'w92'}[turn['role']] }} "
    "{{ turn['content'] }} w93 {% endfor %}{% if add_generation_prompt %}w92 {% endif %}"
)
NOTHING_TRAINS = {"rounds": 0, "evaluate": False}
DP = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5, "unit": "sequence"}


def write_run(folder: Path, **sections: Any) -> Path:
    """A run directory of a federation that trains nothing, with a chat template; ``sections`` as in a recipe."""
    recipe = write_federation(folder, **{"train": NOTHING_TRAINS, **sections})
    settings = folder / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    run_here(recipe, folder / "run")
    return folder / "run"


class Gateway:
    """A gateway that answers."""

    def __init__(self, commands: Commands, run: Path, *options: object) -> None:
        self.run = run
        self.command: Command = commands.start("gateway", run, "--port", 0, *options)
        self.url = self.command.address
        self.model = run.name

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """The official client, which does not try again."""
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **options)

    @property
    def log(self) -> str:
        return self.command.stderr

    def trunk(self) -> psutil.Process:
        """The process of the trunk that it has started."""
        return self.command.role("trunk")

    def recipe(self) -> Recipe:
        return Recipe.read(self.run / "recipe.toml")
