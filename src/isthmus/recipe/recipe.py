"""The recipe itself: reading, checking and writing it."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import tomli_w
from pydantic import Field, ValidationError, model_validator

from isthmus.errors import RecipeError
from isthmus.recipe.aggregation import check_aggregation
from isthmus.recipe.buffer import check_buffer
from isthmus.recipe.local import check_local
from isthmus.recipe.noise import check_noise
from isthmus.recipe.privacy import PrivacySection
from isthmus.recipe.section import Count, Section
from isthmus.recipe.sections import (
    BoundarySection,
    EdgeSection,
    FederationSection,
    LoraSection,
    ModelSection,
    RootSection,
    SiloSection,
    TaskSection,
    TrunkSection,
    WireSection,
)
from isthmus.recipe.sensitivity import SensitivitySection
from isthmus.recipe.train import TrainSection
from isthmus.recipe.tree import Tree


class Recipe(Section):
    """A whole federation. Paths are relative to the folder of the recipe's file."""

    seed: int = 0
    threads: Count | None = None
    """Torch threads of each process; left out: torch's own choice."""
    model: ModelSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    task: TaskSection = TaskSection()
    boundary: BoundarySection = BoundarySection()
    sensitivity: SensitivitySection | None = None
    privacy: PrivacySection = PrivacySection()
    wire: WireSection = WireSection()
    trunk: TrunkSection = TrunkSection()
    root: RootSection = RootSection()
    federation: FederationSection = FederationSection()
    edge: tuple[EdgeSection, ...] = Field(default=(), strict=False)
    silo: tuple[SiloSection, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [*(edge.name for edge in self.edge), *(silo.name for silo in self.silo)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name {twice[0]!r} is given twice; rename one")
        if {"trunk", "root", "ca"} & set(names):
            raise ValueError("the names 'trunk', 'root' and 'ca' are taken; rename the silo")
        check_buffer(self)
        assert self.tree
        if self.trunk.average_every is not None and self.trunk.adapter == "shared":
            raise ValueError("trunk.average_every: a shared adapter is not averaged; set trunk.adapter = 'replica'")
        if self.train.evaluate and not any(silo.held_out for silo in self.silo):
            raise ValueError("train.evaluate: no silo has held_out rows; set evaluate = false or name held_out files")
        if self.boundary.release_once and not self.lora.freeze_bottom:
            raise ValueError(
                "boundary.release_once: a bottom that trains gives new states each time; set lora.freeze_bottom = true"
            )
        if self.boundary.release_once and self.boundary.denoise:
            raise ValueError(
                "boundary.denoise: noise that was drawn once is not kept; leave out denoise or boundary.release_once"
            )
        self._defensible()
        check_aggregation(self)
        check_local(self)
        check_noise(self)
        for field in self.sensitivity.fields if self.sensitivity else ():
            if field not in self.task.fields:
                used = ", ".join(sorted(self.task.fields)) or "none"
                raise ValueError(f"sensitivity.fields: no template has {field!r}; use one of: {used}")
        self._affordable()
        return self

    def _defensible(self) -> None:
        """A defence that could teach nobody anything, or measures what is not there, is refused."""
        defence, boundary = self.boundary.defence, self.boundary
        if defence is None:
            return
        if self.lora.freeze_bottom:
            raise ValueError("boundary.defence: a frozen bottom learns nothing; set lora.freeze_bottom = false")
        if not (boundary.residual or boundary.gradients):
            raise ValueError("boundary.defence: no loss reaches bottom; set boundary.residual = true")
        if defence.capacity and not boundary.forward.bounded:
            raise ValueError("boundary.defence.capacity: without noise or clip a channel carries anything; add both")

    def _affordable(self) -> None:
        """A budget that no release could keep to is refused here rather than at the first frame."""
        of_records = ("forward", "gradient") if self.boundary.gradients else ("forward",)
        noise = self.federation.noise
        of_silo = of_records if noise is not None and noise.where == "silos" else (*of_records, "update")
        classes = self.sensitivity.classes if self.sensitivity else {}
        budgets = {
            "privacy.record_epsilon": (self.privacy.record_epsilon, of_records),
            "privacy.silo_epsilon": (self.privacy.silo_epsilon, of_silo),
            **{f"sensitivity.classes.{name}.epsilon": (one.epsilon, of_records) for name, one in classes.items()},
        }
        for key, (budget, paths) in budgets.items():
            for path in paths if budget is not None else ():
                if not getattr(self.boundary, path).bounded:
                    raise ValueError(
                        f"{key}: what leaves by boundary.{path} has no clip or no noise, so no finite epsilon; "
                        f"give boundary.{path} both, or leave the budget out"
                    )

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a TOML file, its paths made absolute.

        Raises:
            RecipeError: the file is missing, is not TOML, or says something unknown or impossible.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}", remedy="check the path") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not TOML: {error}", remedy="mend the line it names") from error
        return cls.of(values).anchored(path.resolve().parent)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Recipe:
        """The recipe these values describe (see ``read``)."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explained(error) from None

    def anchored(self, folder: Path) -> Recipe:
        """The same recipe with relative paths resolved against ``folder``."""

        def absolute(path: str) -> str:
            return str(folder / Path(path).expanduser())

        local = (folder / self.model.path).exists() or self.model.path.startswith((".", "/", "~"))
        return self.model_copy(
            update={
                "model": self.model.model_copy(
                    update={"path": absolute(self.model.path) if local else self.model.path}
                ),
                "sensitivity": self.sensitivity and self.sensitivity.anchored(absolute),
                "wire": self.wire.model_copy(update={"certificates": absolute(self.wire.certificates)}),
                "silo": tuple(
                    silo.model_copy(
                        update={
                            "train": absolute(silo.train),
                            "held_out": absolute(silo.held_out) if silo.held_out else None,
                        }
                    )
                    for silo in self.silo
                ),
            }
        )

    def toml(self) -> str:
        """This recipe as TOML text; ``Recipe.read`` of it gives an equal recipe."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def tree(self) -> Tree:
        """Who sends whom what it learned."""
        return Tree(self)

    def steps(self, name: str) -> int:
        """How many optimizer steps this silo takes in a round."""
        own = {silo.name: silo.steps for silo in self.silo}.get(name)
        return own or self.train.steps

    def of_silo(self, name: str) -> Recipe:
        """The same recipe with the rank that this silo's ends have; alpha / rank, the scale of what they do, stays."""
        rank = self.party(name).rank
        if rank is None:
            return self
        lora = self.lora.model_copy(update={"rank": rank, "alpha": self.lora.alpha * rank / self.lora.rank})
        return self.model_copy(update={"lora": lora})

    def party(self, name: str) -> SiloSection:
        """The section of the silo with this name."""
        for silo in self.silo:
            if silo.name == name:
                return silo
        known = ", ".join(silo.name for silo in self.silo)
        raise RecipeError(f"the recipe has no silo {name!r}", remedy=f"use one of: {known}")


def _explained(error: ValidationError) -> RecipeError:
    """One complaint of pydantic as key, reason and remedy: an unknown key first, it may be why one is missing."""
    complaints = error.errors()
    first = next((one for one in complaints if one["type"] == "extra_forbidden"), complaints[0])
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        return RecipeError(f"unknown key {key!r}", remedy=f"did you mean {near[0]!r}? known: {', '.join(known)}")
    if first["type"] == "missing":
        return RecipeError(f"the key {key!r} is missing", remedy=f"add {key} to the recipe")
    if first["type"] == "value_error":
        reason, _, remedy = str(first["ctx"]["error"]).partition("; ")
        return RecipeError(reason, remedy=remedy)
    return RecipeError(f"{key} = {first['input']!r}: {first['msg']}", remedy=f"correct the value of {key}")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        if get_origin(section) is dict:
            section = get_args(section)[1]
            continue
        section = section.model_fields[part].annotation
        if get_origin(section) is not dict:
            section = getattr(section, "__args__", (section,))[0]
    return sorted(section.model_fields)
