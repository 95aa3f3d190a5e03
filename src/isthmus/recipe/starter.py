"""A starter recipe: about twenty lines with the keys that have no useful default; and the shipped examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from isthmus.errors import RecipeError

MASKED = 3
"""Fewest silos of whose updates a sum hides each one."""


@dataclass(frozen=True)
class StartingSilo:
    """A silo and its files, as the recipe names them."""

    name: str
    train: str | None
    """None: the silo names its own when it joins."""
    held_out: str | None = None


@dataclass(frozen=True)
class Starter:
    """What a first recipe says."""

    model: str
    silos: tuple[StartingSilo, ...]
    task: Mapping[str, Any]
    cut: tuple[int, int] | None = None
    """Blocks at the bottom and at the top; None: measured when a run starts."""
    masks: bool = False
    address: str | None = None
    """``host:port`` at which silos reach trunk and root; None: this machine alone does."""

    def text(self) -> str:
        """The file, TOML."""
        lines = ["# Paths are relative to this file. Every other key has a default: isthmus init --example federation"]
        lines += [f"task.{key} = {_value(value)}" for key, value in self.task.items()]
        if self.masks:
            lines.append("federation.secure.masks = true  # the root learns the sum of the silos' updates alone")
        lines += ["", "[model]", f"path = {_value(self.model)}"]
        if self.cut is None:
            lines.append('cut = "auto"                     # measured when the run starts; or bottom = 2, top = 2')
        else:
            lines += [f"bottom = {self.cut[0]}", f"top = {self.cut[1]}"]
        if self.address is not None:
            lines += ["", f"[trunk]\naddress = {_value(self.address)}", f"[root]\naddress = {_value(self.address)}"]
        for silo in self.silos:
            own = silo.train is None  # a placeholder: who joins names its own
            train = _value(f"{silo.name}.jsonl" if silo.train is None else silo.train)
            note = "  # its own: isthmus join INVITE --train FILE" if own else ""
            lines += ["", "[[silo]]", f"name = {_value(silo.name)}", f"train = {train}{note}"]
            lines += [f"held_out = {_value(silo.held_out)}"] if silo.held_out else []
        return "\n".join(lines) + "\n"


def examples() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(one.name.removesuffix(".toml") for one in _shipped().iterdir() if one.name.endswith(".toml"))


def example(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        RecipeError: there is none of this name.
    """
    if name not in examples():
        raise RecipeError(f"there is no example {name!r}", remedy=f"use one of: {', '.join(examples())}")
    return (_shipped() / f"{name}.toml").read_text(encoding="utf-8")


def _shipped() -> Traversable:
    return files("isthmus") / "recipes"


def _value(value: Any) -> str:
    """A text, or a list of texts, as TOML; JSON's escapes are among TOML's."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_value, value))}]"
