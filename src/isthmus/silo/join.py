"""Joining: from a recipe and a silo's name to a split model that is connected to the trunk."""

from __future__ import annotations

import copy
import secrets
import shutil
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from isthmus.data.silo_data import SiloData
from isthmus.errors import ModelError
from isthmus.model import adapters
from isthmus.model.bottleneck import Bottleneck
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
from isthmus.silo.remote import RemoteTrunk, RoundsClient
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
    rounds: RoundsClient
    """Begins the trunk's rounds and steps its adapter."""
    boundary: Boundary

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.model.ends

    @property
    def guard(self) -> Guard | None:
        """Teaches bottom what may cross, if the recipe has a defence."""
        guard = self.model.guard
        assert guard is None or isinstance(guard, Guard)
        return guard

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
    known = open_records(recipe, tokenizer, records)
    boundary = Boundary(
        recipe.boundary,
        ledger,
        budget=Budget(recipe.privacy, ledger.history()),
        records=known,
        released=_open_released(recipe, bottom, checkpoint, releases),
    )
    model = assemble(recipe, checkpoint, (bottom, top), channel, boundary)
    assert isinstance(model.trunk, RemoteTrunk)
    return Silo(model, tokenizer, model.trunk, RoundsClient(channel), boundary)


def assemble(
    recipe: Recipe, checkpoint: Checkpoint, ends: tuple[Part, Part], channel: Channel, boundary: Boundary
) -> SplitForCausalLM:
    """The split model of a silo, of its ends and the trunk behind this channel."""
    bottom, top = ends
    section, bottleneck = recipe.boundary, Bottleneck.of(bottom, top)
    denoise = bottleneck is not None and bottleneck.denoises
    width: int = checkpoint.config.hidden_size
    trunk = RemoteTrunk(channel, boundary, width, gradients=section.gradients, denoise=denoise)
    strength = recipe.sensitivity.attention if recipe.sensitivity else 0.0
    table_VE = bottom.family.embedding_of(bottom.model).get_parameter("weight")
    guard = None
    if section.defence is not None:
        guard = Guard(section.defence, boundary, bottleneck, table_VE, recipe.seed)
    model = SplitForCausalLM(
        copy.deepcopy(checkpoint.config),
        bottom,
        trunk,
        top,
        boundary=boundary,
        tail=section.tail,
        residual=section.residual,
        bottleneck=bottleneck,
        shield=Shield(boundary.records, strength) if strength else None,
        guard=guard,
    )
    with suppress(OSError):  # a model folder may lack one
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.eval()
    return model


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
    records = silo.boundary.records
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
        adapters.add_trained_layers(part, recipe)
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


def _open_released(recipe: Recipe, bottom: Part, checkpoint: Checkpoint, folder: Path | None) -> Released | None:
    """The silo's released examples, in this folder or in one that goes with the process."""
    if not recipe.boundary.release_once:
        return None
    if folder is not None:
        return Released(folder, bottom, recipe, checkpoint.fingerprint)
    passing = tempfile.mkdtemp(prefix="isthmus-released-")
    released = Released(Path(passing), bottom, recipe, checkpoint.fingerprint)
    weakref.finalize(released, shutil.rmtree, passing, ignore_errors=True)
    return released
