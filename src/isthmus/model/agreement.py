"""What a party says of itself when it connects, so that no two with different recipes or models work together."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from isthmus.errors import CutMovedError
from isthmus.model.adapters import start_digest
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.shared import check_shared, shared_keys, without_silos
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb

CONFIG, START = "the digest of config.json", "the digest of the adapter at lora.start"
TOKENIZER = "the digest of tokenizer.json"
CUT = {"model.bottom", "model.top"}
"""The shared keys that change where the cut moves."""
_TOKENS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
"""Keys of tokenizer.json that fix which numbers a text becomes."""


def agreed_keys(recipe: Recipe, checkpoint: Checkpoint | None = None) -> dict[str, str]:
    """What all parties must have alike: the recipe's shared keys, and by their digests the model's configuration, the
    tokenizer if the folder has its tokenizer.json, and the adapter that all start from.

    Args:
        checkpoint: of the recipe's model, if there is one already.

    Raises:
        ModelError: the model folder has no usable configuration, or the folder ``lora.start`` no usable adapter.
        NotSupportedError: that adapter is no plain LoRA adapter.
    """
    checkpoint = checkpoint or Checkpoint(recipe.model.path)
    start = {} if recipe.lora.start is None else {START: _short(start_digest(recipe))}
    tokenizer = _tokenizer(checkpoint.folder)
    return {**shared_keys(recipe), CONFIG: _short(checkpoint.config_digest), **tokenizer, **start}


def check_agreed(
    peer: str,
    theirs: Mapping[str, str],
    here: str,
    own: Mapping[str, str],
    earlier: Sequence[Mapping[str, str]] = (),
) -> None:
    """Compare what two parties have (``agreed_keys``); tokenizers only if both have one, as a server needs none.

    Args:
        earlier: what a party has that joined before the last silos were added, and does not know of them.

    Raises:
        MismatchError: as ``check_shared``.
        CutMovedError: the cut moves in this run, and nothing else differs: one of them has not moved it yet.
    """
    own = next((one for one in earlier if one.get("silo.name") == theirs.get("silo.name")), own)
    alone = {TOKENIZER} - (theirs.keys() & own.keys())
    theirs, own = ({key: value for key, value in keys.items() if key not in alone} for keys in (theirs, own))
    differing = {key for key in theirs.keys() | own.keys() if theirs.get(key) != own.get(key)}
    if "model.moves" in own and differing and differing <= CUT:
        cuts = [f"({keys.get('model.bottom')}, {keys.get('model.top')})" for keys in (theirs, own)]
        raise CutMovedError(
            f"{peer} has the cut {cuts[0]}, {here} {cuts[1]}: it moves in this run, and one of them is behind",
            remedy="wait: a role that runs takes it up by itself; start it again if it has ended. Before the first "
            "move, give all parties one recipe",
        )
    check_shared(peer, theirs, here, own)


def earlier_keys(recipe: Recipe, keys: Mapping[str, str], added: Collection[str]) -> list[dict[str, str]]:
    """What parties have that joined before some silos were added, which a recipe lists in the order in which they came.

    Args:
        keys: ``agreed_keys`` of the recipe.
        added: silos of it that were added since the federation began.
    """
    silos = [silo.name for silo in recipe.silo]
    late = [name for name in silos if name in added]
    return [without_silos(keys, silos, late[count:]) for count in range(len(late))]


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


def _tokenizer(folder: Path) -> dict[str, str]:
    """Its digest; nothing if there is no such file, or none that a silo could use."""
    try:
        read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        written = json.dumps([read[key] for key in _TOKENS], sort_keys=True)
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {TOKENIZER: _short(hashlib.sha256(written.encode()).hexdigest())}


def _short(digest: str) -> str:
    return json.dumps(digest[:16])
