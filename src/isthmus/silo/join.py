"""Joining: from a recipe and a silo's name to a split model that is connected to the trunk."""

from __future__ import annotations

import copy
import secrets
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from isthmus.data.silo_data import SiloData
from isthmus.errors import ModelError
from isthmus.model import adapters
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.device import CPU, find_device
from isthmus.model.split import SplitForCausalLM
from isthmus.privacy.budget import Budget
from isthmus.privacy.ledger import Ledger, MemoryLedger
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.silo.defence.guard import Guard
from isthmus.silo.defence.shield import Shield
from isthmus.silo.records import Records
from isthmus.silo.released import Released
from isthmus.silo.remote import RemoteTrunk
from isthmus.wire import frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity


@dataclass
class Silo:
    """One silo's side of the federation."""

    model: SplitForCausalLM
    tokenizer: PreTrainedTokenizerBase
    trunk: RemoteTrunk
    boundary: Boundary
    guard: Guard | None = None
    """Teaches bottom what may cross, if the recipe wants that."""

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.model.ends

    def close(self) -> None:
        self.trunk.channel.close()
        self.boundary.ledger.close()


def join(
    recipe: Recipe,
    name: str,
    *,
    ledger: Ledger | None = None,
    channel: Channel | None = None,
    releases: Path | None = None,
    records: Path | None = None,
) -> Silo:
    """Load the ends of the model and connect to the trunk.

    Args:
        name: the silo's, as in the recipe.
        ledger: notes what leaves; in memory by default.
        channel: a way to the trunk other than the recipe's address.
        releases: where a silo that releases each example once keeps what it released; by default a folder that goes
            with the process, as such a ledger does.
        records: where the silo keeps the key of its records' names; by default they last as long as the process.

    Raises:
        IsthmusError: the model folder, the device, the certificates or the trunk are unusable; the kind says which.
    """
    device = find_device(recipe.party(name).device)
    checkpoint = Checkpoint(recipe.model.path)
    tokenizer = load_tokenizer(checkpoint.folder)
    bottom, top = load_ends(checkpoint, recipe, device)
    if channel is None:
        channel = connect(recipe, name, "Trunk", recipe.trunk.address, greeting(checkpoint, recipe))
    ledger = ledger or MemoryLedger()
    boundary = Boundary(recipe.boundary, ledger, budget=Budget(recipe.privacy, ledger.history()))
    known = open_records(recipe, tokenizer, records)
    trunk = RemoteTrunk(channel, boundary, known, ends=(bottom, top), gradients=recipe.boundary.gradients)
    strength = recipe.sensitivity.attention if recipe.sensitivity else 0.0
    shield = Shield(known, strength) if strength else None
    if recipe.boundary.release_once:
        folder = releases or _passing_folder(trunk)
        trunk.released = Released(folder, bottom, boundary, recipe, checkpoint.fingerprint, shield)
    config = copy.deepcopy(checkpoint.config)
    model = SplitForCausalLM(config, bottom, trunk, top, tail=recipe.boundary.tail, residual=recipe.boundary.residual)
    model.shield = shield
    model.guard = guard = _guard(recipe, model, trunk)
    model.generation_config = copy.deepcopy(_generation_config(checkpoint, model))
    return Silo(model.eval(), tokenizer, trunk, boundary, guard)


def open_records(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> Records:
    """The register of a silo, kept in this folder if one is given.

    Raises:
        RecipeError, DataError, ModelError: sensitivity is asked for, but its function, its file of names or the
            tokenizer is unusable.
    """
    if recipe.sensitivity is None:
        return Records(folder)
    if not tokenizer.is_fast:
        raise ModelError(
            "sensitivity needs to know which characters a token stands for, and this tokenizer cannot say",
            remedy="use a model with a tokenizer.json, or leave out [sensitivity]",
        )

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return text

    return Records(folder, Sensitivity(recipe.sensitivity), decode)


def known_data(recipe: Recipe, name: str, silo: Silo) -> SiloData:
    """The silo's rows, which its register knows from now on.

    Raises:
        DataError: a file is unusable, or the silo's own sensitivity function failed.
    """
    records = silo.trunk.records
    data = SiloData(recipe.party(name), recipe, silo.tokenizer, records.sensitivity)
    records.learn([*data.train, *data.held_out], data.train, recipe.boundary.tail)
    return data


def load_ends(checkpoint: Checkpoint, recipe: Recipe, device: torch.device = CPU) -> tuple[Part, Part]:
    """Bottom and top with fresh adapters, on this device."""
    cut = Cut(recipe.model.bottom, recipe.model.top)
    dtype = getattr(torch, recipe.model.dtype)
    bottom = load_part(checkpoint, cut, "bottom", dtype=dtype, device=device)
    top = load_part(checkpoint, cut, "top", dtype=dtype, device=device, tied=bottom)
    for part in (bottom, top):
        adapters.equip(part, recipe)
    return bottom, top


def greeting(checkpoint: Checkpoint, recipe: Recipe) -> pb.Hello:
    """The first frame to the trunk: what model and cut this silo has."""
    return pb.Hello(
        version=frames.VERSION,
        fingerprint=checkpoint.fingerprint,
        bottom=recipe.model.bottom,
        top=recipe.model.top,
        instance=secrets.token_hex(8),
    )


def connect(
    recipe: Recipe, name: str, service: str, address: str, hello: pb.Hello | None = None, *, server: str | None = None
) -> GrpcChannel:
    """A channel of this silo to ``Trunk`` or ``Root`` (see ``GrpcChannel``)."""
    identity = Identity.load(Path(recipe.wire.certificates), name)
    return GrpcChannel(
        address,
        service,
        identity,
        server=server,
        greeting=hello,
        deadline=recipe.wire.deadline,
        limit=recipe.wire.max_frame_bytes,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer in {folder}", remedy="put the model's tokenizer files there") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _guard(recipe: Recipe, model: SplitForCausalLM, trunk: RemoteTrunk) -> Guard | None:
    if recipe.boundary.defence is None:
        return None
    return Guard(recipe.boundary.defence, trunk, model.get_input_embeddings().get_parameter("weight"), recipe.seed)


def _passing_folder(owner: object) -> Path:
    """A folder that goes when its owner does."""
    folder = tempfile.mkdtemp(prefix="isthmus-released-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _generation_config(checkpoint: Checkpoint, model: SplitForCausalLM):  # type: ignore[no-untyped-def]
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(checkpoint.folder)
    except OSError:
        return model.generation_config
