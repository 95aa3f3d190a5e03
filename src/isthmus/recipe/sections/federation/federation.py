"""``[federation]``: how updates become the next shared adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from isthmus.recipe.section import Positive, Section
from isthmus.recipe.sections.federation.asynchronous import AsynchronousSection
from isthmus.recipe.sections.federation.clip import ClipSection
from isthmus.recipe.sections.federation.compression import CompressionSection
from isthmus.recipe.sections.federation.fairness import FairnessSection
from isthmus.recipe.sections.federation.noise import NoiseSection
from isthmus.recipe.sections.federation.optimizer import OptimizerSection
from isthmus.recipe.sections.federation.robust import RobustSection
from isthmus.recipe.sections.federation.secure import SecureSection
from isthmus.recipe.sections.federation.weights import WeightsSection


class FederationSection(Section):
    """How the silos' updates become the next shared adapters."""

    moved = {  # noqa: RUF012
        **{key: f"secure.{key}" for key in ("masks", "range")},
        **{key: f"compression.{key}" for key in ("keep", "bits", "feedback")},
        **{key: f"robust.{key}" for key in ("rule", "malicious", "mix", "trusted")},
        **{key: f"asynchronous.{key}" for key in ("buffer", "staleness")},
    }

    lora: Literal["frozen-a", "alternating", "svd", "plain"] = "frozen-a"
    """How the adapters B·A of bottom and top are averaged. "frozen-a": A never trains, so that the mean of B·A is
    exactly mean(B)·A. "alternating": B trains in odd rounds and A in even ones, exact too. "svd": both train, of ranks
    that may differ, and the mean of B·A is cut to lora.rank; experimental: its learning is not
    measured on a real model. "plain": both train and are averaged apart, which is not
    exactly the mean of B·A."""
    between: Literal["rest", "train"] = "rest"
    """Adapters of blocks that some silos keep and others leave to the trunk (silo.bottom, silo.top). "rest": they keep
    the values that they start from. "train": they train in these silos, and on the trunk with the others; the root
    averages both. Trunk and root must then be one process ('isthmus run', 'isthmus trunk --with-root')."""
    updates: Literal["changes", "gradients"] | None = Field(default=None, examples=["gradients"])
    """What silos send after a round. "changes": of their adapters, by steps of their own (FedAvg). "gradients": of one
    step's rows, at adapters that no silo moves; the root takes one step of train.optimizer with their mean, as one
    model on all rows of the step would (FedSGD, McMahan et al. 2017), so that both factors may train. Left out:
    "gradients" under masks, where a round has one step and no key of the recipe is about silos' own steps; else
    "changes". Open gradients are the root's to invert: of few rows they give the text away."""
    normalized: bool = False
    """If true, a silo's change counts as if it had taken as many steps as the others (FedNova, Wang et al. 2020).
    Experimental: with one to nine steps a silo it halved the rounds on one set of unlike silos, and saved none on
    another."""
    control: Literal["none", "scaffold"] = "none"
    """"scaffold": the difference between a silo's gradients and the mean, as earlier rounds showed it, is taken out of
    its steps (SCAFFOLD, Karimireddy et al. 2020, option II). Needs sgd and equal weights; not with compression, edges
    or a robust rule. It doubles the download, not the update. Experimental: on two sets of unlike silos it saved
    an eighth of the rounds on one, none on the other."""
    max_change: Positive | None = Field(default=None, examples=[1.0])
    """Largest L2 norm of the change of the shared adapters in one round that a silo accepts from the root. Left out:
    what the recipe implies (a clip of open updates, the range of masked ones, or the rate of adam or adagrad), else no
    bound."""
    weights: WeightsSection = WeightsSection()
    fairness: FairnessSection = FairnessSection()
    optimizer: OptimizerSection = OptimizerSection()
    secure: SecureSection = SecureSection()
    compression: CompressionSection = CompressionSection()
    robust: RobustSection = RobustSection()
    asynchronous: AsynchronousSection = AsynchronousSection()
    noise: NoiseSection | None = None
    clip: ClipSection | None = None
