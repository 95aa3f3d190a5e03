"""Which keys of a recipe all parties must have alike, which each may have for itself, and how two parties compare them.

Every key is in ``SHARED`` or in ``FREE``. Parties tell each other the shared ones when they connect; free ones stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from isthmus.errors import MismatchError
from isthmus.recipe.recipe import Recipe
from isthmus.recipe.section import Section

LONGEST = 200
"""Characters of a value that are sent; of a longer one, its beginning and its SHA-256 are."""
_OWN_FILE = "a file on one party's machine"
_OWN_MACHINE = "each party's machine is its own"
_REACH = "how a party reaches another, or where it listens, may differ from place to place"
_TRUNKS = "a limit of the trunk's own machine, on which nobody else acts"
_WAIT = "how long one party waits, which nobody else acts on"
_OWN_BUDGET = "a silo's own limit on what leaves it; it may be stricter than others, and nobody else acts on it"

FREE: dict[str, str] = {
    "threads": _OWN_MACHINE,
    "patience": _WAIT,
    "model.path": "a place on each party's machine; the files are compared by their fingerprint",
    "model.leakage": "what a cut is chosen by before anything starts; the cut is compared",
    "lora.start": "a place on each party's machine; the adapters in it are compared by their digest",
    "train.keep_rounds": "how much of its own disk each party gives to earlier rounds; training reads the last ones",
    "train.micro_batches": "how a silo cuts its steps into frames; the step is the same",
    "train.long_rows": "what a silo does with its own rows that are too long",
    "train.duplicates": "what a silo does with its own training rows that it holds out, too",
    "train.evaluate": "each silo measures on its own held-out rows, for itself",
    "train.evaluate_rows": "each silo measures on its own held-out rows, for itself",
    "sensitivity.function": _OWN_FILE,
    "sensitivity.names": _OWN_FILE,
    "sensitivity.region": "a silo's own country",
    "privacy.record_epsilon": _OWN_BUDGET,
    "privacy.silo_epsilon": _OWN_BUDGET,
    "wire.certificates": _OWN_FILE,
    "wire.deadline": _WAIT,
    "wire.answer_deadline": _WAIT,
    "trunk.address": _REACH,
    "trunk.replicas": _REACH,
    "trunk.device": _OWN_MACHINE,
    "trunk.patience": _WAIT,
    "trunk.lease": _TRUNKS,
    "trunk.sessions": _TRUNKS,
    "trunk.session_bytes": _TRUNKS,
    "trunk.stash_bytes": _TRUNKS,
    "trunk.chunk": _TRUNKS,
    "trunk.together": _TRUNKS,
    "trunk.gather": _TRUNKS,
    "trunk.kept_bytes": _TRUNKS,
    "root.address": _REACH,
    "root.patience": _WAIT,
    "edge.address": _REACH,
    "edge.patience": _WAIT,
    "federation.max_change": "a silo's own limit on what it accepts; nobody else acts on it",
    "silo.train": _OWN_FILE,
    "silo.held_out": _OWN_FILE,
    "silo.format": _OWN_FILE,
    "partition.data": _OWN_FILE,
    "partition.format": _OWN_FILE,
    "silo.columns": "a silo's own names for what its files hold",
    "silo.device": _OWN_MACHINE,
    "silo.weights": "how exactly a silo computes its own ends; what is shared has 32 bits",
    "silo.recompute": "how a silo spends its own memory and time; the step is the same",
}
"""The keys that may differ, each with the reason."""

OWN_PLACES = frozenset(key for key, reason in FREE.items() if reason in (_OWN_FILE, _OWN_MACHINE))
"""The keys about one party's machine: its files, its devices, its code. Nobody else's word on them counts."""

_RELEASE = ("mechanism", "clip", "noise", "epsilon", "delta", "unit")
_TABLES: dict[str, tuple[str, ...]] = {
    "model": ("cut", "bottom", "top", "moves", "dtype"),
    "lora": ("rank", "alpha", "rslora", "dropout", "targets", "freeze_bottom"),
    "train": (
        *("rounds", "steps", "epochs", "most_rows", "batch", "max_tokens"),
        *("optimizer", "learning_rate", "schedule", "warmup", "weight_decay", "max_grad_norm"),
        *("momentum", "proximal", "sharpness"),
    ),
    "task": ("name", "prompt", "answer", "choices", "truncate", "chat", "system", "messages", "text", "join"),
    "boundary": ("tail", "width", "residual", "denoise", "gradients", "release_once", "differences"),
    "boundary.codec": ("forward_up", "forward_down", "gradient_up", "gradient_down"),
    "boundary.forward": _RELEASE,
    "boundary.gradient": _RELEASE,
    "boundary.update": _RELEASE,
    "boundary.defence": ("answer", "inverter", "capacity", "correlation"),
    "sensitivity": ("detectors", "detected", "fields", "attention", "classes"),
    "privacy": ("delta",),
    "wire": ("max_frame_bytes",),
    "trunk": ("dtype", "weights", "adapter", "average_every", "max_silo_norm"),
    "root": ("minimum",),
    "federation": ("lora", "between", "updates", "normalized", "control"),
    "federation.weights": ("kind", "bound"),
    "federation.fairness": ("kind", "strength", "reference", "bound"),
    "federation.optimizer": ("kind", "learning_rate", "momentum", "second_momentum", "adaptivity"),
    "federation.secure": ("masks", "range"),
    "federation.compression": ("kind", "keep", "bits", "feedback"),
    "federation.robust": ("rule", "malicious", "mix", "trusted"),
    "federation.asynchronous": ("buffer", "staleness"),
    "federation.noise": ("where", "multiplier", "epsilon", "colluding"),
    "federation.clip": ("norm", "quantile", "rate", "norms"),
    "partition": ("by", "field", "alpha", "held_out", "seed"),
    "edge": ("name", "silos", "parent", "sibling", "minimum"),
    "silo": ("name", "rank", "bottom", "top", "steps", "most_rows"),
}
SHARED = frozenset({"seed", *(f"{table}.{key}" for table, keys in _TABLES.items() for key in keys)})
"""The keys that must not differ. Of ``edge`` and ``silo`` each table has its own values, by name: everyone must know
who is in the federation, of what rank, and for how many steps."""


def shared_keys(recipe: Recipe) -> dict[str, str]:
    """The shared keys of a recipe with their values as JSON; of optional tables that are left out, none.

    A key of a silo's or an edge's table has its name in it: ``silo.north.steps``.
    """
    return {key: _written(value) for key, value in _values(recipe.whole) if _kind(key) not in FREE}


def check_shared(peer: str, theirs: Mapping[str, str], here: str, own: Mapping[str, str]) -> None:
    """Compare the shared keys of a peer with one's own.

    Args:
        peer, here: names of the two parties, as the message calls them.
        theirs, own: as ``shared_keys``, with what else must be alike.

    Raises:
        MismatchError: a value differs, or one party alone has the key. It names every such key, with both values.
    """
    differing = [key for key in sorted({*theirs, *own}) if theirs.get(key) != own.get(key)]
    if not differing:
        return
    first, *others = (f"{key} = {_said(theirs, key)}, {here} {_said(own, key)}" for key in differing)
    more = "".join(f"; {one}" for one in others[:9]) + (f"; and {len(others) - 9} more" if len(others) > 9 else "")
    raise MismatchError(
        f"{peer} has {first}{more}",
        remedy="give all parties the same values of these keys in their recipes, "
        "and the same files where it is a digest",
    )


def without_silos(keys: Mapping[str, str], silos: Sequence[str], absent: Collection[str]) -> dict[str, str]:
    """These shared keys as a recipe without some silos has them.

    Args:
        silos: all silos of the recipe, in its order.
        absent: those that are left out.
    """
    tables = tuple(f"silo.{name}." for name in absent)
    names = _written([name for name in silos if name not in absent])
    return {key: value for key, value in keys.items() if not key.startswith(tables)} | {"silo.name": names}


def _said(keys: Mapping[str, str], key: str) -> str:
    return keys.get(key, "none")


def _values(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of a table and its subtables, with their values."""
    for name in type(section).model_fields:
        key, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, Section):
            yield from _values(value, f"{key}.")
        elif key in ("edge", "silo"):
            yield f"{key}.name", [one.name for one in value]
            for one in value:
                yield from (
                    (long, own) for long, own in _values(one, f"{key}.{one.name}.") if _kind(long) != f"{key}.name"
                )
        elif value is not None:
            yield key, value


def _kind(key: str) -> str:
    """The key without the name of a silo or an edge."""
    table, _, rest = key.partition(".")
    return f"{table}.{rest.rpartition('.')[2]}" if table in ("edge", "silo") else key


def _written(value: Any) -> str:
    def plain(one: Any) -> Any:
        return one.model_dump(mode="json", exclude_none=True)

    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=plain)
    if len(text) <= LONGEST:
        return text
    return f"{text[:60]}… (SHA-256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()})"
