"""Cuts of single silos (``silo.bottom``, ``silo.top``)."""

from __future__ import annotations

from isthmus.recipe.sections import (
    BoundarySection,
    EdgeSection,
    FederationSection,
    LoraSection,
    ModelSection,
    SiloSection,
    TrainSection,
    TrunkSection,
)


def check_cuts(
    model: ModelSection, silos: tuple[SiloSection, ...], boundary: BoundarySection, lora: LoraSection
) -> None:
    """Refuse a silo that keeps fewer blocks than the trunk leaves to it, a bottleneck at several depths, and an adapter
    to start from that some silos would compute without."""
    for silo in silos:
        for key, own, least in (("bottom", silo.bottom, model.bottom), ("top", silo.top, model.top)):
            if own is not None and own < least:
                raise ValueError(
                    f"silo.{key}: {silo.name} would keep {own} of the {least} blocks that the trunk leaves to all "
                    f"silos; raise it to {least} or more, or lower model.{key} for all"
                )
    ends = {(silo.bottom or model.bottom, silo.top or model.top) for silo in silos}
    if ends != {(model.bottom, model.top)} and lora.freeze_bottom and lora.start is not None:
        raise ValueError(
            "lora.start: with lora.freeze_bottom a silo with a larger bottom has no adapter in blocks in which the "
            "trunk has one; leave out lora.start or lora.freeze_bottom, or silo.bottom"
        )
    if boundary.width is not None and ends != {(model.bottom, model.top)}:
        raise ValueError(
            "boundary.width: a bottleneck's layers learn the hidden states of one depth, and these silos' cross at "
            "several; leave out boundary.width, or silo.bottom and silo.top"
        )


def check_measured_cut(model: ModelSection, silos: tuple[SiloSection, ...]) -> None:
    """Refuse silos' own cuts beside one that is to be measured for all."""
    own = [silo.name for silo in silos if silo.bottom is not None or silo.top is not None]
    if model.cut == "auto" and own:
        raise ValueError(
            f"model.cut: a measurement chooses one cut for all silos, and {own[0]} has its own; "
            "leave out silo.bottom and silo.top, or state model.bottom and model.top"
        )


def check_between(federation: FederationSection, trunk: TrunkSection, edges: tuple[EdgeSection, ...]) -> None:
    """Refuse to train blocks that some silos keep and others leave to the trunk beside what takes all updates alike."""
    own = "the root averages these blocks among some silos and the trunk"
    refused = {
        "federation.secure.masks": (
            federation.secure.masks,
            f"{own}, and a sum of the few silos that keep a block would hide none of them",
        ),
        "[[edge]]": (bool(edges), f"{own}, and edges pass on one sum of all"),
        "federation.asynchronous.buffer": (
            federation.asynchronous.buffer is not None,
            "the trunk's change is of a round that all silos end together",
        ),
        "federation.robust": (
            federation.robust.active,
            f"{own}, too few for a rule, and none knows the trunk's change from a malicious one",
        ),
        f"federation.lora = {federation.lora!r}": (
            federation.lora in ("alternating", "svd"),
            "the trunk trains both factors at once, and has no turns and no ranks",
        ),
        f"federation.weights = {federation.weights.kind!r}": (
            federation.weights.kind != "examples",
            "the trunk's change counts by the tokens behind it, and so must the silos'",
        ),
        "federation.fairness": (
            federation.fairness.kind != "none",
            "the trunk's change counts by the tokens behind it, and so must the silos'",
        ),
        "federation.control": (
            federation.control != "none",
            "the trunk has no control, and its silos' are of one layout",
        ),
        "federation.normalized": (federation.normalized, "the trunk's change is not of one silo's steps"),
        "federation.noise": (
            federation.noise is not None,
            "the trunk's change has no clip, and the noise follows from one",
        ),
        "federation.clip": (federation.clip is not None, "the trunk's change has no clip"),
        "trunk.adapter = 'replica'": (
            trunk.adapter == "replica",
            "replicas are averaged within the round, and the root averages at its end",
        ),
    }
    for key, (present, reason) in refused.items():
        if present:
            raise ValueError(f"federation.between: {reason}; leave out {key}, or set federation.between = 'rest'")


def check_moves(
    model: ModelSection,
    lora: LoraSection,
    train: TrainSection,
    boundary: BoundarySection,
    federation: FederationSection,
    trunk: TrunkSection,
    silos: tuple[SiloSection, ...],
) -> None:
    """Refuse moves of the cut that come in no order, change nothing, or stand beside what is of one cut."""
    if not model.moves:
        return
    for move in model.moves:
        if "after" not in move or not move.keys() & {"bottom", "top"}:
            raise ValueError(
                "model.moves: a move says after how many rounds, and to which blocks; "
                "write it as { after = 10, bottom = 3 }"
            )
    rounds = [move["after"] for move in model.moves]
    if rounds != sorted(set(rounds)) or rounds[-1] >= train.rounds:
        raise ValueError(
            f"model.moves: they come after the rounds {', '.join(map(str, rounds))} of {train.rounds}; "
            "order them, each after another round and the last one before the end"
        )
    depth = "its layers learn the hidden states of one depth"
    silent = "what is kept of it is of one cut's tensors"
    refused = {
        "silo.bottom and silo.top": (any(one.bottom or one.top for one in silos), "the cut of all silos moves"),
        "model.cut": (model.cut != "stated", "a measurement chooses one cut"),
        "boundary.width": (boundary.width is not None, depth),
        "boundary.residual": (boundary.residual, depth),
        "boundary.defence": (boundary.defence is not None, depth),
        "boundary.release_once": (boundary.release_once, "what was released is of one cut"),
        "lora.freeze_bottom": (lora.freeze_bottom, "a block that moves to bottom would lose its adapter"),
        f"federation.lora = {federation.lora!r}": (
            federation.lora == "svd",
            "the root makes new factors each round, and a block that comes from the trunk has its own",
        ),
        "trunk.adapter = 'replica'": (trunk.adapter == "replica", "a replica's block would have no one owner"),
        "federation.updates": (federation.updates == "gradients", "the root's moments are of one cut's tensors"),
        "federation.optimizer": (federation.optimizer.kind != "none", silent),
        "federation.compression": (not federation.compression.exact, silent),
        "federation.robust": (federation.robust.active, silent),
        "federation.control": (federation.control != "none", silent),
        "federation.asynchronous.buffer": (
            federation.asynchronous.buffer is not None,
            "the cut moves when all silos have ended a round",
        ),
        "federation.max_change": (
            federation.max_change is not None,
            "it bounds what silos change, and a block comes with what the trunk changed in it",
        ),
    }
    for key, (present, reason) in refused.items():
        if present:
            remedy = "set federation.lora = 'plain'" if "federation.lora" in key else f"leave out {key}"
            raise ValueError(f"model.moves: {reason}; {remedy}, or leave out model.moves")
