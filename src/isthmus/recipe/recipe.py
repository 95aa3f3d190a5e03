"""The recipe itself: reading, checking and writing it."""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast, get_args, get_origin

import tomli_w
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from isthmus.errors import RecipeError
from isthmus.recipe.address import NoAddress
from isthmus.recipe.checks.aggregation import check_influence, check_products, check_ranks, check_weights
from isthmus.recipe.checks.asynchrony import check_asynchrony
from isthmus.recipe.checks.boundary import check_defence, check_release_once
from isthmus.recipe.checks.budgets import check_budgets
from isthmus.recipe.checks.cuts import check_between, check_cuts, check_measured_cut, check_moves
from isthmus.recipe.checks.evaluation import check_evaluation
from isthmus.recipe.checks.gradients import check_gradients, obstacles
from isthmus.recipe.checks.local_steps import check_control, check_epochs, check_sharpness, check_steps
from isthmus.recipe.checks.masks import check_cohorts, check_compression
from isthmus.recipe.checks.noise import check_noise
from isthmus.recipe.checks.partition import check_partition
from isthmus.recipe.checks.robustness import check_robustness
from isthmus.recipe.checks.sensitivity import check_fields
from isthmus.recipe.checks.tree import check_names, check_tree
from isthmus.recipe.checks.weights import check_rounded
from isthmus.recipe.section import COUNTRY, DEVICE, NAME, Count, Positive, Section
from isthmus.recipe.sections import (
    BoundarySection,
    EdgeSection,
    FederationSection,
    LoraSection,
    ModelSection,
    PartitionSection,
    PrivacySection,
    RootSection,
    SensitivitySection,
    SiloSection,
    TaskSection,
    TrainSection,
    TrunkSection,
    WireSection,
)
from isthmus.recipe.sections.train import MOST_ROWS
from isthmus.recipe.tree import Tree
from isthmus.recipe.waits import Waits

PATTERNS = {
    DEVICE: "'cpu', 'cuda', 'cuda:1' or 'auto'",
    NAME: "1 to 63 lower-case letters, digits, '-' and '_', beginning with a letter or digit",
    COUNTRY: "a country's two capital letters",
}
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text in quotes",
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "string_too_short": "a text that is not empty",
    "too_short": "a list of {min_length} or more",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
}
"""By kind of complaint of pydantic: the values that are allowed."""


@dataclass(frozen=True)
class RoundSteps:
    """A silo's optimizer steps in one round."""

    count: int
    """Steps in the round."""
    before: int
    """Steps in all rounds before."""
    total: int
    """Steps in the whole run."""


_CHECKSUM = "# checksum of the lines below (delete this line if you edit them): "


class Recipe(Section):
    """A whole federation. Paths are relative to the folder of the recipe's file."""

    seed: int = 0
    """Seed of the adapters' first values and the order of the data. Noise never follows from it."""
    threads: Count | None = Field(default=None, examples=[2])
    """Threads that PyTorch uses in each process. Left out: PyTorch's own choice."""
    patience: Positive = 300.0
    """Seconds that parties wait for one that is slow, or not there: the one setting of time for most federations. What
    is left out follows from it: root.patience is as long, trunk.patience and wire.deadline a fifth, edge.patience a
    quarter of its parent's, wire.answer_deadline twice as long."""
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
    partition: PartitionSection | None = None
    edge: tuple[EdgeSection, ...] = Field(default=(), strict=False)
    silo: tuple[SiloSection, ...] = Field(min_length=1, strict=False)
    _whole: Recipe | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        edges, silos, federation, boundary, tree = self.edge, self.silo, self.federation, self.boundary, self.tree
        check_names(silos, edges)
        check_compression(federation)
        check_asynchrony(federation, self.root, self.trunk, silos, edges)
        check_tree(tree, edges)
        check_cohorts(federation, tree)
        check_partition(self.partition, silos, self.train.rounds)
        check_evaluation(self.train, self.evaluating)
        check_release_once(boundary, self.lora)
        check_defence(boundary, self.lora)
        check_ranks(self.lora, federation, silos)
        check_measured_cut(self.model, silos)
        check_rounded(self.model, self.trunk, silos)
        check_cuts(self.model, silos, boundary, self.lora)
        check_moves(self.model, self.lora, self.train, boundary, federation, self.trunk, silos)
        if self.trains_between:
            check_between(federation, self.trunk, edges)
        check_products(federation, edges)
        check_weights(federation, silos, edges, self.evaluating)
        check_influence(federation, boundary.update)
        check_robustness(federation, tree)
        check_steps(self.train, silos, federation, self.trunk)
        check_epochs(self.train, silos, federation, self.trunk)
        check_sharpness(self.train, boundary, self.lora, self.trunk)
        check_control(self.train, silos, edges, federation, self.privacy, self.sensitivity)
        check_gradients(self.train, silos, federation)
        check_noise(self.train, federation, boundary.update, edges, tree)
        check_fields(self.sensitivity, self.task)
        check_budgets(self.privacy, self.sensitivity, boundary, federation.noise)
        return self

    @classmethod
    def read(cls, path: Path | str, *, undecided: bool = False) -> Recipe:
        """The recipe in a TOML file, its paths made absolute.

        Args:
            undecided: also one whose cut is not chosen yet (``model.cut = "auto"``).

        Raises:
            RecipeError: the file is missing, is not TOML, or has an unknown key or an impossible value; or it begins
                with a checksum (see ``with_checksum``) of other lines; or its cut is not chosen yet.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
            _verify(path, text)
            values = tomllib.loads(text)
        except IsADirectoryError as error:
            raise RecipeError(
                f"cannot read the recipe {path}: it is a folder",
                remedy=f"name the file; a run in that folder is continued with 'isthmus run --resume {path}'",
            ) from error
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}", remedy="check the path") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 text: {error}", remedy="save the file as UTF-8") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path} is not TOML: {error}", remedy="correct the line it names") from error
        recipe = cls.of(values).anchored(path.resolve().parent)
        if not undecided:
            recipe.require_cut(path)
        return recipe

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
                "lora": self.lora.model_copy(update={"start": absolute(self.lora.start) if self.lora.start else None}),
                "sensitivity": self.sensitivity and self.sensitivity.anchored(absolute),
                "wire": self.wire.model_copy(update={"certificates": absolute(self.wire.certificates)}),
                "partition": self.partition and self.partition.anchored(absolute),
                "silo": tuple(silo.anchored(absolute) for silo in self.silo),
            }
        )

    def require_cut(self, path: Path | str = "RECIPE") -> None:
        """Refuse a recipe whose cut is not chosen yet: all parties must have one and the same.

        Raises:
            RecipeError: ``model.cut`` is "auto".
        """
        if self.model.cut == "auto":
            raise RecipeError(
                'model.cut = "auto" leaves the cut to a measurement, which has not been made',
                remedy=f"run 'isthmus cut --write {path}' where a silo's rows are, and give all parties the recipe "
                "that it writes; 'isthmus run' on one machine measures by itself",
            )

    def with_cut(self, bottom: int, top: int) -> Recipe:
        """The same recipe with this cut stated."""
        model = self.model.model_copy(update={"cut": "stated", "bottom": bottom, "top": top})
        return self.model_copy(update={"model": model})

    def toml(self) -> str:
        """This recipe as TOML text; ``Recipe.read`` of it gives an equal recipe."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @property
    def evaluating(self) -> frozenset[str]:
        """Names of the silos that have held-out rows."""
        share = self.partition is not None and self.partition.held_out > 0
        return frozenset(silo.name for silo in self.silo if silo.held_out or (share and not silo.train))

    @property
    def tree(self) -> Tree:
        """The tree of aggregation: which party sends its update to which."""
        return Tree(self.silo, self.edge, self.root, self.waits.round, self.federation.asynchronous.buffer)

    @property
    def waits(self) -> Waits:
        """How long parties wait for one another."""
        wire = self.wire
        return Waits.of(
            self.patience,
            step=self.trunk.patience,
            round=self.root.patience,
            reach=wire.deadline,
            answer=wire.answer_deadline,
        )

    @property
    def sends_gradients(self) -> bool:
        """Whether silos' updates are gradients, with which the root steps (see ``federation.updates``)."""
        if self.federation.updates is not None:
            return self.federation.updates == "gradients"
        if self.model.moves:  # the root's moments would be of one cut's tensors
            return False
        return self.federation.secure.masks and not any(obstacles(self.train, self.silo, self.federation))

    def steps(self, name: str) -> int:
        """Optimizer steps of this silo in a round."""
        own = {silo.name: silo.steps for silo in self.silo}.get(name)
        return own or self.train.steps

    def most_weight(self, silos: Iterable[str]) -> float:
        """Largest weight in a round of an update of these silos together: every row of every step as long as rows may
        be; with ``train.epochs`` of a silo with as many rows as it may have."""
        if self.federation.weights.kind == "equal":
            return float(len(set(silos)))
        return float(sum(self._most_steps(silo) for silo in silos) * self.train.step_tokens)

    def _most_steps(self, name: str) -> int:
        """Largest number of optimizer steps of this silo in a round."""
        if self.train.epochs is None:
            return self.steps(name)
        return -(-self.most_run_steps(name) // self.train.rounds)

    def most_rows(self, name: str) -> int:
        """Most training rows of this silo with ``train.epochs``."""
        own = {silo.name: silo.most_rows for silo in self.silo}.get(name)
        return own or self.train.most_rows or MOST_ROWS

    def most_run_steps(self, name: str) -> int:
        """Largest number of optimizer steps of this silo in a run with ``train.epochs``."""
        return self.round_steps(name, 1, self.most_rows(name)).total

    def round_steps(self, name: str, round: int, rows: int = 0) -> RoundSteps:
        """This silo's steps in a round.

        Args:
            rows: number of its training rows; only ``train.epochs`` asks for it.
        """
        train = self.train
        if train.epochs is None:
            own = self.steps(name)
            return RoundSteps(own, (round - 1) * own, train.rounds * own)
        return self.part_of_run(train.epochs * -(-rows // train.batch), round)

    def part_of_run(self, total: int, round: int) -> RoundSteps:
        """The steps of one round where so many in the whole run are divided evenly among all rounds."""
        before = total * (round - 1) // self.train.rounds
        return RoundSteps(total * round // self.train.rounds - before, before, total)

    def rate(self, steps: Iterable[tuple[RoundSteps, int]]) -> float:
        """Learning rate of one optimizer step.

        Args:
            steps: of each silo that contributes, its steps in this round and the number of this one, from 1. The silo
                with most steps in the run says how far it is.
        """
        plan, step = max(steps, key=lambda pair: (pair[0].total, pair[1]))
        return self.train.rate(plan.before + step, plan.total)

    def rates(self, plan: RoundSteps) -> list[float]:
        """Learning rate of each of a silo's optimizer steps in a round."""
        return [self.rate([(plan, step)]) for step in range(1, plan.count + 1)]

    def mean_reach(self, round: int) -> float:
        """τ of FedNova, by which the mean of normalized changes is multiplied: the mean over all silos of the recipe.

        The paper weighs it by the round's silos. It only sets the size of the step, and one that is known beforehand
        lets each silo multiply by it: no silo has to reveal how many steps it made.
        """
        return sum(self.train.reach(self.rates(self.round_steps(silo.name, round))) for silo in self.silo) / len(
            self.silo
        )

    def ends(self, name: str) -> tuple[int, int]:
        """Number of blocks of this silo's bottom and top."""
        own, model = self.party(name), self.whole.model
        return own.bottom or model.bottom, own.top or model.top

    @property
    def widest(self) -> tuple[int, int]:
        """Number of blocks of the largest bottom and of the largest top of all silos."""
        ends = [self.ends(silo.name) for silo in self.silo]
        return max(bottom for bottom, _ in ends), max(top for _, top in ends)

    def of_silo(self, name: str, *, ranked: bool = True) -> Recipe:
        """The same recipe with the cut of this silo, and the adapter rank of its bottom and top; their scale stays.

        Args:
            ranked: whether the rank is the silo's, too.
        """
        rank, ends = self.party(name).rank if ranked else None, self.ends(name)
        own = self._cut_at(ends)
        if rank is not None:
            own = own.model_copy(update={"lora": self.lora.ranked(rank)})
            own._whole = self.whole
        return own

    @property
    def step_releases(self) -> tuple[int, int]:
        """How often a row's hidden states and its gradients leave in one training step."""
        if self.train.sharpness:  # a pass uphill comes before; of a frozen bottom it sends no gradient
            return 2, 1 if self.lora.freeze_bottom else 2
        return 1, 1

    @property
    def of_widest(self) -> Recipe:
        """The same recipe with the largest bottom and the largest top of all silos as its cut."""
        return self._cut_at(self.widest)

    @property
    def mixes_cuts(self) -> bool:
        """Whether some silos keep blocks that others leave to the trunk."""
        return self.widest != (self.whole.model.bottom, self.whole.model.top)

    @property
    def trains_between(self) -> bool:
        """Whether the adapters of such blocks train."""
        return self.mixes_cuts and self.federation.between == "train"

    @property
    def freezes_a(self) -> bool:
        """Whether LoRA's A of silos' blocks is what it was at the start, so that nobody has to be told. Where the cut
        moves, a block may come with an A that the trunk trained: silos then get it with the shared adapters."""
        return self.federation.lora == "frozen-a" and not self.model.moves

    def next_move(self, completed: int) -> tuple[int, tuple[int, int]] | None:
        """The next move of the cut: the round after which it is due, and the blocks of bottom and top from then on.

        Args:
            completed: number of finished rounds. A move that is due after them is the next one until it is made.
        """
        model = self.model
        for move in self.model.moves or ():
            ends = move.get("bottom", model.bottom), move.get("top", model.top)
            if move["after"] >= completed and ends != (model.bottom, model.top):
                return move["after"], ends
        return None

    def moved_to(self, ends: tuple[int, int]) -> Recipe:
        """The same recipe with another cut for all."""
        model = self.model.model_copy(update={"bottom": ends[0], "top": ends[1]})
        return self.model_copy(update={"model": model})

    def cut_after(self, after: int) -> tuple[int, int]:
        """The blocks of bottom and top once the move after this round is made.

        Raises:
            RecipeError: no move is due after this round.
        """
        ends = self.model.bottom, self.model.top
        for move in self.model.moves or ():
            ends = move.get("bottom", ends[0]), move.get("top", ends[1])
            if move["after"] == after:
                return ends
        raise RecipeError(f"no move of the cut is due after round {after}", remedy="give all parties one recipe")

    def deepest(self, name: str) -> tuple[int, int]:
        """Most blocks of this silo's bottom and of its top, now and after all moves of the cut."""
        bottom, top = self.ends(name)
        for move in self.model.moves or ():
            bottom, top = max(bottom, move.get("bottom", 0)), max(top, move.get("top", 0))
        return bottom, top

    @property
    def opens_updates(self) -> bool:
        """Whether silos' updates leave without noise, clip, mask or budget: what they protect, moments would tell."""
        update, privacy = self.boundary.update, self.privacy
        protected = update.noise or update.clip or update.mechanism != "gaussian"
        budgets = privacy.record_epsilon is not None or privacy.silo_epsilon is not None
        return not (protected or budgets or self.federation.secure.masks or self.federation.noise is not None)

    def _cut_at(self, ends: tuple[int, int]) -> Recipe:
        if ends == (self.model.bottom, self.model.top):
            return self
        model = self.model.model_copy(update={"bottom": ends[0], "top": ends[1]})
        own = self.model_copy(update={"model": model})
        own._whole = self.whole
        return own

    @property
    def whole(self) -> Recipe:
        """The federation's recipe, of which this one may be a silo's own (see ``of_silo``)."""
        return self._whole or self

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
    table = ".".join(str(part) for part in first["loc"][:-1])
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if alternatives := _alternatives(complaints, first["loc"]):
        expected = ", or ".join(dict.fromkeys(map(_expected, alternatives)))
        return RecipeError(f"{table} = {first['input']!r}: expected {expected}", remedy=f"correct the value of {table}")
    if first["type"] == "extra_forbidden":
        section = _section(first["loc"][:-1])
        if now := section.moved.get(str(first["loc"][-1])):
            return RecipeError(f"the key {key!r} has moved", remedy=f"write {table}.{now} in its place")
        known = sorted(section.model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        return RecipeError(f"unknown key {key!r}", remedy=f"did you mean {near[0]!r}? known: {', '.join(known)}")
    if first["type"] == "missing":
        return RecipeError(f"the key {key!r} is missing", remedy=f"add {key} to the recipe")
    if first["type"] == "value_error" and not isinstance(first["ctx"]["error"], NoAddress):
        reason, _, remedy = str(first["ctx"]["error"]).partition("; ")
        return RecipeError(f"{key}.{reason}" if first["loc"] else reason, remedy=remedy)
    return RecipeError(f"{key} = {first['input']!r}: expected {_expected(first)}", remedy=f"correct the value of {key}")


def _alternatives(complaints: Sequence[Mapping[str, Any]], place: tuple[Any, ...]) -> list[Mapping[str, Any]]:
    """The complaints about the key at this place, if it may have values of several types: one of each type."""
    if not place or isinstance(place[-1], int) or _is_table(place[:-1]):
        return []
    return [one for one in complaints if one["loc"][:-1] == place[:-1]]


def _is_table(location: tuple[int | str, ...]) -> bool:
    found: Any = _section(location)
    return isinstance(found, type) and issubclass(found, Section)


def _expected(complaint: Mapping[str, Any]) -> str:
    """The values that a key allows, of a complaint of pydantic about another."""
    kind, context = complaint["type"], complaint.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    if kind == "value_error":
        return str(context["error"])
    return EXPECTED[kind].format(**context) if kind in EXPECTED else complaint["msg"]


def _section(location: tuple[int | str, ...]) -> type[Section]:
    """The class of the table at this place of a recipe."""
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
    return cast("type[Section]", section)


def with_checksum(toml: str) -> str:
    """TOML text with a first line that is the checksum of the others: of a damaged file no other recipe is read."""
    return f"{_CHECKSUM}{hashlib.sha256(toml.encode()).hexdigest()}\n{toml}"


def _verify(path: Path, text: str) -> None:
    first, _, toml = text.partition("\n")
    if first.startswith(_CHECKSUM) and first != with_checksum(toml).partition("\n")[0]:
        raise RecipeError(
            f"{path} is not as it was written: its checksum does not match",
            remedy="restore it from a backup; if you have edited it, delete its first line, the checksum",
        )
