"""Steps that silos take alone between two aggregations: their number, two passes of one step, and controls."""

from __future__ import annotations

from isthmus.recipe.sections import (
    BoundarySection,
    EdgeSection,
    FederationSection,
    LoraSection,
    PrivacySection,
    SensitivitySection,
    SiloSection,
    TrainSection,
    TrunkSection,
)


def check_steps(
    train: TrainSection, silos: tuple[SiloSection, ...], federation: FederationSection, trunk: TrunkSection
) -> None:
    """Refuse unequal numbers of steps, and their normalization, where nothing can be made of them."""
    if _uneven(train, silos) and trunk.adapter == "replica":
        raise ValueError(
            "silo.steps: replicas are averaged at the same steps of all silos; "
            "set trunk.adapter = 'shared', or give all silos as many steps"
        )
    if federation.normalized and federation.lora == "svd":
        raise ValueError(
            "federation.normalized: products of factors are averaged as they are, and a factor for the change is not "
            "one for its product; set federation.lora = 'alternating', or normalized = false"
        )


def check_epochs(
    train: TrainSection, silos: tuple[SiloSection, ...], federation: FederationSection, trunk: TrunkSection
) -> None:
    """Refuse passes over the rows beside what must know every silo's number of steps."""
    if train.epochs is None:
        if bounded := [silo.name for silo in silos if silo.most_rows is not None]:
            raise ValueError(
                f"silo.most_rows: only train.epochs makes steps of rows; leave it out for {bounded[0]}, "
                "or set train.epochs"
            )
        return
    impossible = {
        "a silo's passes take as many steps as its rows need; leave silo.steps out": any(silo.steps for silo in silos),
        "replicas are averaged at the same steps of all silos, and silos have unequal rows; "
        "set trunk.adapter = 'shared'": trunk.adapter == "replica",
        "the mean of the silos' steps, by which a change is normalized, would reveal how many rows they have; "
        "set federation.normalized = false": federation.normalized,
        "silos with unequal rows go unequally far, and a control is computed from that; "
        "set federation.control = 'none'": federation.control != "none",
        "versions of a buffer are not rounds that every silo is in, so no silo would make just these passes; "
        "leave federation.asynchronous.buffer out": federation.asynchronous.buffer is not None,
    }
    for reason in (reason for reason, present in impossible.items() if present):
        raise ValueError(f"train.epochs: {reason}, or leave epochs out")


def check_sharpness(train: TrainSection, boundary: BoundarySection, lora: LoraSection, trunk: TrunkSection) -> None:
    """Refuse a first pass of sharpness-aware steps that would train something, or give other outputs."""
    if not train.sharpness:
        return
    if boundary.defence is not None:
        raise ValueError(
            "train.sharpness: a defence learns at every pass, and a step has two; "
            "set train.sharpness = 0, or leave boundary.defence out"
        )
    if lora.dropout:
        raise ValueError(
            "train.sharpness: a step has two passes, and with dropout the second would be of another model; "
            "set train.sharpness = 0, or lora.dropout = 0"
        )
    if trunk.adapter == "replica" and lora.freeze_bottom and boundary.gradients:
        raise ValueError(
            "train.sharpness: with a frozen bottom the first pass has no backward pass through the trunk, and such a "
            "pass goes through the replicas' mean; set trunk.adapter = 'shared', or train.sharpness = 0"
        )


def check_control(
    train: TrainSection,
    silos: tuple[SiloSection, ...],
    edges: tuple[EdgeSection, ...],
    federation: FederationSection,
    privacy: PrivacySection,
    sensitivity: SensitivitySection | None,
) -> None:
    """Refuse a control that would not be the mean of the silos' gradients, or not the same at silo and root."""
    if federation.control != "scaffold":
        return
    uneven = _uneven(train, silos) or _budgeted(privacy, sensitivity)
    impossible = {
        f"it is computed from how far a silo went, and {train.optimizer!r} goes another way than the gradients; "
        "set train.optimizer = 'sgd'": train.optimizer != "sgd",
        "it is computed from how far a silo went, and momentum goes on from earlier rounds; "
        "leave train.momentum out": train.momentum > 0,
        "it would take the proximal pull for a gradient; leave train.proximal out": train.proximal > 0,
        "it would take the decay of weights for a gradient; leave train.weight_decay out": train.weight_decay > 0,
        "it would take what clipping left of a gradient for all of it; "
        "leave train.max_grad_norm out": train.max_grad_norm is not None,
        "it is computed from how far a silo went in a round, and by a schedule rounds go unequally far; "
        "set train.schedule = 'constant', and leave warmup out": train.schedule != "constant" or train.warmup > 0,
        "it is the mean of the silos' gradients only where all count alike; "
        "set federation.weights = 'equal', and leave fairness out": federation.weights.kind != "equal"
        or federation.fairness.kind != "none",
        "a rule that rejects a silo's change would have to reject its control, which is the silo's own; "
        "set federation.robust.rule = 'mean' and mix = false": federation.robust.active,
        "what compression left out would count as a gradient of zero; "
        "leave federation.compression out": not federation.compression.exact,
        "with lora = 'svd' each round has new factors, for which the gradients of old ones mean nothing; "
        "set federation.lora = 'alternating'": federation.lora == "svd",
        "silos must learn whether the root has their change, and an edge does not know; leave [[edge]] out": bool(
            edges
        ),
        "silos with other numbers of steps (their own, or rows that a budget skips) go unequally far; "
        "set federation.normalized = true": not federation.normalized and uneven,
    }
    for reason in (reason for reason, present in impossible.items() if present):
        raise ValueError(f"federation.control: {reason}, or control = 'none'")


def _uneven(train: TrainSection, silos: tuple[SiloSection, ...]) -> bool:
    return len({silo.steps or train.steps for silo in silos}) > 1


def _budgeted(privacy: PrivacySection, sensitivity: SensitivitySection | None) -> bool:
    """Whether a silo may have to skip rows."""
    classes = sensitivity.classes.values() if sensitivity else ()
    budgets = (privacy.record_epsilon, privacy.silo_epsilon, *(one.epsilon for one in classes))
    return any(budget is not None for budget in budgets)
