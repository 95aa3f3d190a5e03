"""The recipe: one TOML file that fixes a whole federation.

``Recipe.read`` refuses, at start, every unknown key (naming the nearest known one), wrong type and impossible
combination. A recipe is frozen: what a run did can be read off the copy in its run directory.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isthmus.errors import RecipeError

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Dtype = Literal["float32", "bfloat16", "float16"]
Codec = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp32+zstd", "bf16+zstd", "fp16+zstd", "int8+zstd", "int4+zstd"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(Section):
    """The base model and where it is cut."""

    path: str
    """Folder of a Hugging Face model (``config.json`` and safetensors), or a model id of the hub."""
    bottom: Count = 2
    """Blocks that a silo keeps at the input side."""
    top: Count = 2
    """Blocks that a silo keeps at the output side."""
    dtype: Dtype = "float32"


class LoraSection(Section):
    """The adapters: low-rank updates of linear layers, on every part."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1, strict=False)
    """Names of the linear layers that get an adapter."""
    freeze_bottom: bool = False
    """Bottom gets no adapter and stays the base model's: silos then share, and train, the top's alone."""


class TrainSection(Section):
    """What each silo does in a round."""

    rounds: Count = 4
    steps: Count = 10
    """Optimizer steps a round."""
    batch: Count = 4
    """Rows a step and silo."""
    micro_batches: Annotated[int, Field(ge=1, le=64)] = 1
    """Parts that a step's rows cross in, several on their way at a time: it hides the latency of the wire."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 5e-4
    max_tokens: Count = 512
    """Longest row in tokens; a longer prompt loses its beginning."""
    evaluate: bool = True
    """Measure held-out accuracy (or loss) after every round."""


class ReleaseSection(Section):
    """How one kind of tensor is secured before it leaves a silo."""

    clip: Amount = 0.0
    """Largest L2 norm of one row (one token; for an update, the whole update). 0: not clipped."""
    noise: Amount = 0.0
    """Standard deviation of the Gaussian noise on every coordinate, in the tensor's own units."""


class CodecSection(Section):
    """How matrices are written on the wire, each way; one name in place of the section stands for all four.

    int8 and int4 have a scale for each block of 32 values and keep outliers exact; ``+zstd`` compresses the result.
    """

    forward_up: Codec = "fp32"
    """Hidden states to the trunk."""
    forward_down: Codec = "fp32"
    """Hidden states from the trunk."""
    gradient_up: Codec = "fp32"
    """The loss gradient to the trunk. Gradients are rounded at random, without bias."""
    gradient_down: Codec = "fp32"
    """The gradient for bottom from the trunk."""


class BoundarySection(Section):
    """What the silo's only exit does to the tensors that pass."""

    codec: CodecSection = CodecSection()
    forward: ReleaseSection = ReleaseSection(noise=0.025)
    """Hidden states, in training and inference alike."""
    gradient: ReleaseSection = ReleaseSection(noise=1e-5)
    """The loss gradient on its way into the trunk."""
    update: ReleaseSection = ReleaseSection(noise=1e-4)
    """What bottom and top learned in a round."""
    release_once: bool = False
    """Hidden states of an example leave once, noised once; the trunk keeps them, later epochs name them by a number.

    Needs ``lora.freeze_bottom``: a bottom that trains gives other states each time. Generation is as ever.
    """

    @field_validator("codec", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return dict.fromkeys(CodecSection.model_fields, value) if isinstance(value, str) else value


class TrunkSection(Section):
    address: str = "localhost:7001"
    device: Device = "cpu"
    """Where the trunk computes: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for a CUDA device if there is one."""
    dtype: Dtype | None = None
    """Of the trunk's blocks; left out: ``model.dtype``. An accelerator may want 16 bits where silos want 32."""
    patience: Positive = 60.0
    """Seconds the other silos wait for a slow one at a step, counted from the first that is ready."""
    lease: Positive = 600.0
    """Seconds an inference session is kept without a request."""
    sessions: Count = 64
    """Inference sessions kept at a time; the one longest unused makes room, a new one waits while all are in use."""
    session_bytes: Count = 4 * 2**30
    """Memory, of the trunk's device, for all sessions' KV caches; room is made likewise."""
    chunk: Count = 512
    """Tokens of long prompts computed at a time, so that other sessions' next tokens need not wait."""
    adapter: Literal["shared", "replica"] = "shared"
    """One adapter stepped by all silos' gradients, or one a silo, averaged every ``average_every`` steps."""
    average_every: Count | None = None
    """Optimizer steps between averages of the replicas; left out: the end of each round."""
    together: Count = 8
    """Most silos whose frames are computed in one pass. 1: one after another."""
    gather: Amount = 0.05
    """Seconds that a silo's frame waits for the other silos' of the round, to be computed with them."""
    kept_bytes: Count = 8 * 2**30
    """Bytes on the trunk's disk for examples that silos released once, in equal shares for all silos. In a full share
    the example longest unused makes room; its silo sends it again, as it was, when it needs it."""


class RootSection(Section):
    address: str = "localhost:7001"
    patience: Positive = 300.0
    """Seconds the other silos wait for a slow one at the end of a round, counted from the first that is ready."""
    minimum: Count | None = None
    """Fewest silos that a round needs; left out: all of them."""


class WireSection(Section):
    certificates: str = "certificates"
    """Folder with one folder a party, each holding ``ca.pem``, ``cert.pem`` and ``key.pem``."""
    deadline: Positive = 60.0
    """Seconds to keep trying to reach a peer that is gone."""
    max_frame_bytes: Count = 64 * 2**20


class FederationSection(Section):
    lora: Literal["frozen-a"] = "frozen-a"
    """How bottom and top adapters are averaged: with A frozen, the mean of B·A is exactly mean(B)·A."""


class TaskSection(Section):
    """How a data row becomes a prompt and an answer. ``{field}`` stands for a field of the row."""

    prompt: str = "{prompt}"
    answer: str = "{answer}"
    choices: tuple[str, ...] = Field(default=(), strict=False)
    """The possible answers of a classification task; empty for free text."""


class SiloSection(Section):
    name: Name
    train: str
    """JSONL file of this silo's own rows."""
    held_out: str | None = None
    """JSONL file of rows to measure on."""


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
    wire: WireSection = WireSection()
    trunk: TrunkSection = TrunkSection()
    root: RootSection = RootSection()
    federation: FederationSection = FederationSection()
    silo: tuple[SiloSection, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [silo.name for silo in self.silo]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"silo: the name {twice[0]!r} is given twice; rename one")
        if {"trunk", "root", "ca"} & set(names):
            raise ValueError("silo: the names 'trunk', 'root' and 'ca' are taken; rename the silo")
        if self.minimum > len(names):
            raise ValueError(f"root.minimum: {self.minimum} silos needed but {len(names)} listed; lower it")
        if self.trunk.average_every is not None and self.trunk.adapter == "shared":
            raise ValueError("trunk.average_every: a shared adapter is not averaged; set trunk.adapter = 'replica'")
        if self.train.evaluate and not any(silo.held_out for silo in self.silo):
            raise ValueError("train.evaluate: no silo has held_out rows; set evaluate = false or name held_out files")
        if self.boundary.release_once and not self.lora.freeze_bottom:
            raise ValueError(
                "boundary.release_once: a bottom that trains gives new states each time; set lora.freeze_bottom = true"
            )
        return self

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
    def minimum(self) -> int:
        """Fewest silos that a round needs."""
        return self.root.minimum or len(self.silo)

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
        section = section.model_fields[part].annotation
        section = getattr(section, "__args__", (section,))[0]
    return sorted(section.model_fields)
