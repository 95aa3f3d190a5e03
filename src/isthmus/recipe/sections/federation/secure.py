"""``[federation.secure]``: secure aggregation."""

from __future__ import annotations

from isthmus.recipe.section import Positive, Section


class SecureSection(Section):
    """Secure aggregation; ``secure = true`` sets masks."""

    main = "masks"

    masks: bool = False
    """If true, updates are summed under masks: the root learns their sum and no single update. It takes three silos or
    more. A silo then counts by the share of its rows that it trained on, not by its tokens."""
    range: Positive = 0.25
    """Largest absolute value of a number in a masked update; larger ones are clipped to it. With federation.clip, that
    takes its place."""
