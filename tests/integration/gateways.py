"""Gateways as real processes, over runs whose tiny model has a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from isthmus.recipe import Recipe
from tests.conftest import save_tiny_model
from tests.integration.processes import Command, Commands, run_here, write_federation

TEMPLATE = (
    "{% for turn in messages %}{{ {'system': 'w90', 'user': 'w91', 'assistant': 'w92'}[turn['role']] }} "
    "{{ turn['content'] }} w93 {% endfor %}{% if add_generation_prompt %}w92 {% endif %}"
)
NOTHING_TRAINS = {"rounds": 0, "evaluate": False}
DP = {"mechanism": "dp_gaussian", "clip": 1.0, "epsilon": 1.0, "delta": 1e-5, "unit": "sequence"}


BYTES = 300
"""Vocabulary of a byte-level model."""
BYTE_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_byte_model(folder: Path) -> Path:
    """A tiny model whose tokens spell any text: bytes, and some that texts of JSON often have together."""
    save_tiny_model("llama", folder, vocab_size=BYTES)
    known = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [("{", '"'), ('"', ":"), ('"', ","), ("t", "r"), ("u", "e"), ("tr", "ue"), ("1", "2"), ("}", "}")]
    ids = {token: number for number, token in enumerate([*known, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(ids, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_run(folder: Path, *, byte_level: bool = False, **sections: Any) -> Path:
    """A run directory of a federation that trains nothing, with a chat template; ``sections`` as in a recipe.

    Args:
        byte_level: whether the model is ``save_byte_model``'s.
    """
    recipe = write_federation(folder, **{"train": NOTHING_TRAINS, **sections})
    if byte_level:
        save_byte_model(folder / "model")
    template = BYTE_TEMPLATE if byte_level else TEMPLATE
    settings = folder / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
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
