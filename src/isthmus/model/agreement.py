"""What a party says of itself when it connects, so that no two with different recipes or models work together."""

from __future__ import annotations

import json
import secrets

from isthmus.model.adapters import start_digest
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.shared import shared_keys
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb

CONFIG, START = "the digest of config.json", "the digest of the adapter at lora.start"


def agreed_keys(recipe: Recipe, checkpoint: Checkpoint | None = None) -> dict[str, str]:
    """What all parties must have alike: the recipe's shared keys, and by their digests the model's configuration and
    the adapter that all start from.

    Args:
        checkpoint: of the recipe's model, if there is one already.

    Raises:
        ModelError: the model folder has no usable configuration, or the folder ``lora.start`` no usable adapter.
        NotSupportedError: that adapter is no plain LoRA adapter.
    """
    checkpoint = checkpoint or Checkpoint(recipe.model.path)
    start = {} if recipe.lora.start is None else {START: _short(start_digest(recipe))}
    return {**shared_keys(recipe), CONFIG: _short(checkpoint.config_digest), **start}


def hello_of(recipe: Recipe, checkpoint: Checkpoint | None = None) -> pb.Hello:
    """The first frame to another party: protocol version, cut, shared keys, and a random identifier of this call. It
    has no fingerprint, which only a trunk asks for.

    Args:
        checkpoint: as in ``agreed_keys``.
    """
    return pb.Hello(
        version=frames.VERSION,
        bottom=recipe.model.bottom,
        top=recipe.model.top,
        instance=secrets.token_hex(8),
        keys=agreed_keys(recipe, checkpoint),
    )


def _short(digest: str) -> str:
    return json.dumps(digest[:16])
