"""``[wire]``: connections between the parties."""

from __future__ import annotations

from pydantic import Field

from isthmus.recipe.section import Count, Positive, Section


class WireSection(Section):
    """Connections between the parties."""

    certificates: str = "certificates"
    """Folder with one folder for each party, which holds ``ca.pem``, ``cert.pem`` and ``key.pem``. ``isthmus join``
    makes a party's own from an invite; ``isthmus certificates`` makes all parties', for trials."""
    deadline: Positive | None = Field(default=None, examples=[60.0])
    """Seconds to keep trying to reach a peer that does not answer. Left out: a fifth of patience."""
    answer_deadline: Positive | None = Field(default=None, examples=[600.0])
    """Seconds for an answer that waits for no other party, such as the trunk's to hidden states: more than everything
    takes that all silos may ask of the trunk at once. Longer, and the silo gives up, though the server lives. Left out:
    twice patience."""
    max_frame_bytes: Count = 64 * 2**20
    """Largest message in bytes. Larger ones are refused."""
