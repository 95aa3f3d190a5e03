"""``[trunk]``: the server that computes the model's middle blocks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Amount, Count, Device, Dtype, Positive, Section, ServerAddress, Weights


class TrunkSection(Section):
    """The server that computes the model's middle blocks for all silos."""

    address: ServerAddress = "localhost:7001"
    """Host and port at which it listens."""
    replicas: tuple[ServerAddress, ...] = Field(default=(), strict=False)
    """Hosts and ports of further trunks that serve the same finished run ("isthmus trunk DIR --replica"). Who uses the
    run turns to one of them, with what it had begun, when the trunk that it has is gone. They train nothing."""
    device: Device = "cpu"
    """Where the trunk computes: "cpu", "cuda", "cuda:1", or "auto" for a CUDA device if there is one."""
    dtype: Dtype | None = Field(default=None, examples=["bfloat16"])
    """Data type of the trunk's blocks: an accelerator may want 16 bits where silos want 32. Left out: model.dtype."""
    weights: Weights | None = Field(default=None, examples=["int8"])
    """The linear layers of the trunk's blocks are kept in few bits: the trunk is smaller, and on a processor tokens
    come faster. Its blocks then are not quite the base model's, in training and in use. On a processor, with other
    numbers in 32 bits: "int8", 8 bits with a scale for each output, or "int4", 4 bits with a scale and a zero for each
    64 weights. On CUDA, too: "nf4", 4 bits as QLoRA has them (isthmus[bits]), beside any trunk.dtype. With 4 bits
    values have 8. Left out: as trunk.dtype says."""
    patience: Positive | None = Field(default=None, examples=[60.0])
    """Seconds that the other silos wait for a slow one at a training step, counted from the first that is ready. Left
    out: a fifth of patience."""
    lease: Positive = 600.0
    """Seconds that an inference session is kept without a request."""
    sessions: Count = 64
    """Inference sessions kept at a time. Each silo is entitled to an equal share, and may use what others leave unused.
    The session that was unused longest makes room; if there is none, a new one waits."""
    session_bytes: Count = 4 * 2**30
    """Bytes of the trunk's device for the KV caches of all inference sessions, shared as trunk.sessions are."""
    stash_bytes: Count = 8 * 2**30
    """Bytes of the trunk's device for the activations of training steps between their forward and their backward. Above
    it, those of the silo that holds most are computed again at its backward. Each silo has an equal share for its
    inputs; a step beyond it is refused."""
    chunk: Count = 512
    """Tokens of a long prompt, or while several silos wait of an evaluation, computed in one pass, so that others need
    not wait for all of it. Silos that have more together share them equally."""
    adapter: Literal["shared", "replica"] = "shared"
    """"shared": one adapter that the gradients of all silos step together. "replica": one adapter for each silo, and
    their average every average_every steps."""
    average_every: Count | None = Field(default=None, examples=[2])
    """Optimizer steps between two averages of the replicas; only with adapter = "replica". Left out: one average, at
    the end of each round."""
    max_silo_norm: Positive | None = Field(default=None, examples=[1.0])
    """Largest L2 norm of one silo's gradients in a step of the trunk. Longer ones are scaled down to it before the mean
    is taken: whatever a silo sends, it moves the mean by this times its share of the tokens at most. Left out: no
    bound. Experimental: not measured on a real model."""
    together: Count = 8
    """Most silos whose requests are computed in one pass. 1: one after another."""
    gather: Amount = 0.05
    """Seconds that a silo's request waits for those of the other silos in the round, to be computed with them."""
    kept_bytes: Count = 8 * 2**30
    """Bytes on the trunk's disk for the examples of boundary.release_once, in equal shares for all silos, and as many
    for the answers about them with boundary.differences. When a share
    is full, the example that was unused longest makes room; its silo sends the same bytes again when it needs it."""

    @model_validator(mode="after")
    def _averaged(self) -> Self:
        if self.average_every is not None and self.adapter == "shared":
            raise ValueError(
                "average_every: a shared adapter is not averaged; "
                "set trunk.adapter = 'replica', or leave average_every out"
            )
        return self
