"""The recipe's sections, but for those on privacy."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from isthmus.recipe import robustness
from isthmus.recipe.noise import ClipSection, NoiseSection
from isthmus.recipe.privacy import ReleaseSection
from isthmus.recipe.robustness import RuleName
from isthmus.recipe.section import Amount, Count, Positive, Section
from isthmus.recipe.strategy import FairnessSection, OptimizerSection, WeightsSection

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Dtype = Literal["float32", "bfloat16", "float16"]
Codec = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp32+zstd", "bf16+zstd", "fp16+zstd", "int8+zstd", "int4+zstd"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


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


class DefenceSection(Section):
    """What bottom and the bottleneck learn beside the task, so that what crosses tells the answer and little else.

    Each is the weight of a term of the loss, in nats, at every training step. What weighs nothing is only measured.
    """

    answer: Amount = 0.0
    """What crosses must tell the answer by itself to a small head that stays in the silo."""
    inverter: Amount = 0.0
    """What a simulated inverter, trained along, reads of the tokens out of what crosses: bottom unlearns to tell it."""
    capacity: Amount = 0.0
    """What the noisy channel could carry at most, given the power (before clipping) that bottom spends on it."""
    correlation: Amount = 0.0
    """Distance correlation, 0 to 1, between the tokens' embeddings and what crosses (NoPeek); for comparison."""


class BoundarySection(Section):
    """What the silo's only exit does to the tensors that pass."""

    codec: CodecSection = CodecSection()
    forward: ReleaseSection = ReleaseSection(noise=0.025)
    """Hidden states, in training and inference alike."""
    gradient: ReleaseSection = ReleaseSection(noise=1e-5)
    """The loss gradient on its way into the trunk."""
    update: ReleaseSection = ReleaseSection(noise=1e-4)
    """What bottom and top learned in a round."""
    tail: Count | None = None
    """How many of a prompt's last positions cross; left out: all. The others stay in the silo, in bottom."""
    width: Count | None = None
    """Numbers a token that cross, by a learned projection; left out: the model's own width."""
    residual: bool = False
    """The trunk answers with what its blocks add, and the silo adds it to its own states, which it keeps without noise.

    Top then sees every position, also those that never crossed.
    """
    denoise: bool = False
    """Top is told the noise that its own silo drew, and learns to take its effect out of the trunk's answer."""
    gradients: bool = True
    """Loss gradients cross: the trunk's adapter trains. False: none leaves, and bottom trains by the residual alone."""
    defence: DefenceSection | None = None
    """Left out: bottom learns the task alone."""
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
    """Fewest silos, or edges, that a round needs; left out: all of them, or ``federation.buffer``."""


class EdgeSection(Section):
    name: Name
    address: str
    silos: tuple[str, ...] = Field(default=(), strict=False)
    """The cohort: silos whose updates it sums."""
    parent: str | None = None
    """The edge that takes this one's sums; left out: the root."""
    sibling: str | None = None
    """The edge that takes in this one's silos if it dies; left out: they have no part in the rest."""
    minimum: Count | None = None
    """Fewest silos (or edges) that its part of a round needs; left out: all of them."""
    patience: Positive | None = None
    """Seconds the others wait for a slow one at the end of a round; left out: a quarter of its parent's."""


class WireSection(Section):
    certificates: str = "certificates"
    """Folder with one folder a party, each holding ``ca.pem``, ``cert.pem`` and ``key.pem``."""
    deadline: Positive = 60.0
    """Seconds to keep trying to reach a peer that is gone."""
    max_frame_bytes: Count = 64 * 2**20


UNDER_MASKS = {"none": True, "top-k": False, "random-k": True, "sketch": True}
"""Which compressions a masked sum bears: those that are linear and the same for all silos. Few bits always are."""


class FederationSection(Section):
    lora: Literal["frozen-a", "alternating", "svd", "plain"] = "frozen-a"
    """How bottom and top adapters are averaged. With A frozen, the mean of B·A is exactly mean(B)·A; ``alternating``
    trains B in odd rounds and A in even ones, each exact likewise. ``svd`` trains both, of ranks that may differ, and
    keeps what of the mean of B·A fits ``lora.rank``. ``plain`` averages both apart, which is not the mean of B·A."""
    masks: bool = False
    """Updates are summed under masks: the root learns their sum and no single one. Takes three silos or more; a silo
    weighs by the share of its rows that it trained on, not by its tokens."""
    range: Positive = 0.25
    """Under masks: the largest number that an update sends; what is larger is clipped to it."""
    compression: Literal["none", "top-k", "random-k", "sketch"] = "none"
    """Which numbers of an update cross: all; the largest, with their places; those at places drawn for all silos alike;
    or those of a random rotation, which are all of one size."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.05
    """With compression: the share of an update's numbers that cross."""
    bits: Annotated[int, Field(ge=2, le=32)] | None = None
    """Of each number that crosses: 4, 8, 16 or 32, under masks 2 to 16. Left out: 32, under masks 16."""
    feedback: bool = True
    """What compression left out waits in the silo and is added to its next update."""
    rule: RuleName = "mean"
    """How the root makes one change of many. All but the mean count each alike, whatever it says that it weighs."""
    malicious: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of a round's contributions that the rule must bear, in whole ones, one at least."""
    mix: bool = False
    """Each change gives way to the mean of its nearest before the rule sees it: for silos whose data differ much."""
    trusted: Name | None = None
    """For the rule ``fltrust``: the silo or edge whose change the others' are measured by."""
    normalized: bool = False
    """A silo's change counts as if it had taken as many steps as the others, however many it took (FedNova, Wang et al.
    2020)."""
    control: Literal["none", "scaffold"] = "none"
    """What sets a silo's gradients apart, as earlier rounds showed, is taken out of its steps (SCAFFOLD, Karimireddy et
    al. 2020, option II). Plans are twice as large, updates are not."""
    buffer: Count | None = None
    """Silos train without waiting for one another, and whenever so many updates have come the root makes of them the
    next version of what is shared, a round (FedBuff). Left out: a round is of all silos, who begin and end together."""
    staleness: Annotated[int, Field(ge=0)] = 10
    """With a buffer: versions that may come out while a silo trains. Its update counts 1/√(1 + so many); one of more is
    refused, and the silo begins again with the newest."""
    noise: NoiseSection | None = None
    clip: ClipSection | None = None
    weights: WeightsSection = WeightsSection()
    fairness: FairnessSection = FairnessSection()
    optimizer: OptimizerSection = OptimizerSection()

    @field_validator("weights", "fairness", "optimizer", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sendable(self) -> Self:
        if self.masks and not UNDER_MASKS[self.compression]:
            fitting = ", ".join(name for name, fits in UNDER_MASKS.items() if fits)
            raise ValueError(
                f"federation.compression: a masked sum adds the same places of all silos, {self.compression} sends "
                f"each silo's own; use one of {fitting}, or leave out masks"
            )
        if self.compression == "top-k" and not self.feedback:
            raise ValueError(
                "federation.feedback: without it what is never among the largest is never sent; set feedback = true"
            )
        allowed = range(2, 17) if self.masks else (4, 8, 16, 32)
        if self.bits is not None and self.bits not in allowed:
            known = "2 to 16 under masks" if self.masks else "4, 8, 16 or 32"
            raise ValueError(
                f"federation.bits: no number crosses with {self.bits} bits; use {known}, or leave bits out"
            )
        return self

    @property
    def robust(self) -> bool:
        """Whether a contribution may be disbelieved."""
        return self.rule != "mean" or self.mix

    def faults(self, contributions: int) -> int:
        """How many of so many may be malicious."""
        return robustness.faults(self.malicious, contributions)

    def fewest(self, contributions: int) -> int:
        """How many the rule takes to bear as many malicious ones as there may be among so many."""
        return robustness.fewest(self.rule, self.faults(contributions), mix=self.mix)


class TaskSection(Section):
    """How a data row becomes a prompt and an answer. ``{field}`` stands for a field of the row."""

    prompt: str = "{prompt}"
    answer: str = "{answer}"
    choices: tuple[str, ...] = Field(default=(), strict=False)
    """The possible answers of a classification task; empty for free text."""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the row's fields that the templates use; empty for a template that is malformed."""
        try:
            pieces = [*Formatter().parse(self.prompt), *Formatter().parse(self.answer)]
        except ValueError:
            return frozenset()
        return frozenset(re.split(r"[.\[]", name)[0] for _, name, _, _ in pieces if name)


class SiloSection(Section):
    name: Name
    train: str
    """JSONL file of this silo's own rows."""
    held_out: str | None = None
    """JSONL file of rows to measure on."""
    device: Device = "cpu"
    """Where bottom and top compute, as ``trunk.device``."""
    rank: Count | None = None
    """Of the adapters of this silo's bottom and top, at most ``lora.rank``; left out: that."""
    steps: Count | None = None
    """Optimizer steps of this silo in a round; left out: ``train.steps``. One that is done leaves the trunk's steps to
    the others."""
