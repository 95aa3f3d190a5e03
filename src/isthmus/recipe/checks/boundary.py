"""The boundary beside the adapters: examples released once, and the defence."""

from __future__ import annotations

from isthmus.recipe.sections import BoundarySection, LoraSection


def check_release_once(boundary: BoundarySection, lora: LoraSection) -> None:
    """Refuse ``release_once`` where states change from epoch to epoch, or their noise would be needed again."""
    if boundary.release_once and not lora.freeze_bottom:
        raise ValueError(
            "boundary.release_once: a bottom that trains gives new states each time; set lora.freeze_bottom = true"
        )
    if boundary.release_once and boundary.denoise:
        raise ValueError(
            "boundary.denoise: the noise of examples released once is not kept; "
            "leave out denoise or boundary.release_once"
        )
    if boundary.differences and not boundary.release_once:
        raise ValueError(
            "boundary.differences: without numbers neither side knows that an example comes again; "
            "set boundary.release_once = true, or leave out differences"
        )
    if boundary.differences and not boundary.codec.forward_down.startswith("range-"):
        raise ValueError(
            f"boundary.differences: {boundary.codec.forward_down!r} writes no differences; "
            'set boundary.codec.forward_down = "range-0.5", or leave out differences'
        )


def check_defence(boundary: BoundarySection, lora: LoraSection) -> None:
    """Refuse a defence that trains nothing, or whose measure does not exist."""
    defence = boundary.defence
    if defence is None:
        return
    if lora.freeze_bottom:
        raise ValueError("boundary.defence: a frozen bottom learns nothing; set lora.freeze_bottom = false")
    if not (boundary.residual or boundary.gradients):
        raise ValueError("boundary.defence: no loss reaches bottom; set boundary.residual = true")
    if defence.capacity and not boundary.forward.bounded:
        raise ValueError(
            "boundary.defence.capacity: without noise or clip the channel's capacity is infinite; "
            "give boundary.forward both"
        )
