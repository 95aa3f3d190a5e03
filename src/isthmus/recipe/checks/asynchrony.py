"""Asynchronous rounds (``federation.asynchronous.buffer``), beside everything that needs all silos at once."""

from __future__ import annotations

from isthmus.recipe.sections import EdgeSection, FederationSection, RootSection, SiloSection, TrunkSection


def check_asynchrony(
    federation: FederationSection,
    root: RootSection,
    trunk: TrunkSection,
    silos: tuple[SiloSection, ...],
    edges: tuple[EdgeSection, ...],
) -> None:
    """Refuse a buffer beside anything that needs the updates of all silos to begin and end together."""
    buffer = federation.asynchronous.buffer
    if buffer is None:
        return
    if buffer > len(silos):
        raise ValueError(
            f"federation.asynchronous.buffer: {buffer} updates, but a version has one of each silo at most, and there "
            f"are {len(silos)} silos; lower it"
        )
    if root.minimum is not None and root.minimum > buffer:
        raise ValueError(
            f"root.minimum: a version is made of {buffer} updates and never has {root.minimum}; "
            "lower it, or raise federation.asynchronous.buffer"
        )
    for key, (present, reason) in _refused(federation, trunk, edges).items():
        if present:
            raise ValueError(f"federation.asynchronous.buffer: {reason}; leave out buffer, or {key}")
    if not federation.weights.claimed:
        raise ValueError(
            f"federation.weights: {federation.weights.kind!r} compares updates of one round, and a buffer has updates "
            "of several; weigh by 'examples' or 'equal', or leave out federation.asynchronous.buffer"
        )


def _refused(
    federation: FederationSection, trunk: TrunkSection, edges: tuple[EdgeSection, ...]
) -> dict[str, tuple[bool, str]]:
    """For each setting that a buffer excludes: whether the recipe has it, and the reason."""
    lora, compression, robust, control = (
        federation.lora,
        federation.compression.kind,
        federation.robust,
        federation.control,
    )
    return {
        "federation.secure.masks": (
            federation.secure.masks,
            "masks cancel within one cohort that begins and ends together, and silos of a buffer do not",
        ),
        "[[edge]]": (
            bool(edges),
            "an edge passes on the sum of a round, and a buffer takes single updates, each with its own age",
        ),
        f"federation.lora = {lora!r}": (
            lora in ("alternating", "svd"),
            "which factors an update changes follows from its round, and updates of several rounds come together",
        ),
        f"federation.compression = {compression!r}": (
            compression in ("random-k", "sketch"),
            "numbers take turns by the round, and a slow silo, which has some rounds only, might never send its others",
        ),
        f"federation.robust.rule = {robust.rule!r} and federation.robust.mix": (
            robust.active,
            "a rule withstands a share of malicious silos among all, and among the first to arrive they may be most",
        ),
        f"federation.control = {control!r}": (
            control != "none",
            "controls are the mean of all silos' as one round leaves them, and a version is made of some silos",
        ),
        "trunk.adapter = 'replica'": (
            trunk.adapter == "replica",
            "replicas are averaged when all silos are there, and they never are",
        ),
    }
