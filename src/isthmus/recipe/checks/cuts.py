"""Cuts of single silos (``silo.bottom``, ``silo.top``)."""

from __future__ import annotations

from isthmus.recipe.sections import BoundarySection, LoraSection, ModelSection, SiloSection


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
