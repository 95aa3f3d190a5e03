"""Joining a federation: building a silo's split model from a recipe and connecting it to the trunk."""

from __future__ import annotations

import copy
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
from isthmus.model.agreement import hello_of
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
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity


@dataclass
class Silo:
    """A connected silo: its split model, tokenizer, boundary and clients of the trunk."""

    model: SplitForCausalLM
    tokenizer: PreTrainedTokenizerBase
    trunk: RemoteTrunk
    rounds: RoundsClient
    """Client of the trunk's rounds and optimizer steps."""
    boundary: Boundary
    """The exit of all tensors, with the ledger and the privacy budget."""

    @property
    def parts(self) -> tuple[Part, Part]:
        """Bottom and top."""
        return self.model.ends

    @property
    def guard(self) -> Guard | None:
        """The model's guard; None if the recipe has no ``boundary.defence``."""
        guard = self.model.guard
        assert guard is None or isinstance(guard, Guard)
        return guard

    def close(self) -> None:
        """Close the connection to the trunk and the ledger."""
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
    """Load bottom and top and connect to the trunk.

    Args:
        name: the silo's name in the recipe.
        ledger: records releases; None: a ledger in memory.
        channel: a connection to the trunk; None: one to the recipe's address.
        releases: folder for released examples (``boundary.release_once``); None: a temporary folder, deleted at exit.
        records: folder for the key of record names and the noise scale; None: they end with the process.

    Raises:
        IsthmusError: the model folder, device, certificates or trunk cannot be used; its type says which.
    """
    device = find_device(recipe.party(name).device)
    checkpoint = Checkpoint(recipe.model.path)
    tokenizer = load_tokenizer(checkpoint.folder)
    bottom, top = load_ends(checkpoint, recipe, device)
    if channel is None:
        channel = connect(recipe, name, "Trunk", recipe.trunk.address, greeting(checkpoint, recipe))
    ledger = ledger or MemoryLedger()
    silo_records = open_records(recipe, tokenizer, records)
    boundary = Boundary(
        recipe.boundary,
        ledger,
        budget=Budget(recipe.privacy, ledger.history()),
        records=silo_records,
        released=_open_released(recipe, bottom, checkpoint, releases),
    )
    model = build_model(recipe, checkpoint, (bottom, top), channel, boundary)
    assert isinstance(model.trunk, RemoteTrunk)
    return Silo(model, tokenizer, model.trunk, RoundsClient(channel), boundary)


def build_model(
    recipe: Recipe, checkpoint: Checkpoint, ends: tuple[Part, Part], channel: Channel, boundary: Boundary
) -> SplitForCausalLM:
    """The split model of these ends (bottom, top) and the trunk at the other side of this channel, in eval mode."""
    bottom, top = ends
    section, bottleneck = recipe.boundary, Bottleneck.of(bottom, top)
    denoise = bottleneck is not None and bottleneck.denoises
    config = copy.deepcopy(checkpoint.config.get_text_config())
    config.name_or_path = checkpoint.config.name_or_path
    width: int = config.hidden_size
    trunk = RemoteTrunk(channel, boundary, width, gradients=section.gradients, denoise=denoise)
    strength = recipe.sensitivity.attention if recipe.sensitivity else 0.0
    table_VE = bottom.family.embedding_of(bottom.model).get_parameter("weight")
    guard = None
    if section.defence is not None:
        guard = Guard(section.defence, boundary, bottleneck, table_VE, recipe.seed)
    model = SplitForCausalLM(
        config,
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
    with suppress(OSError):  # a model folder may lack a generation configuration
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.eval()
    return model


def open_records(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> Records:
    """The records of a silo without rows.

    Args:
        folder: as ``records`` in ``join``.

    Raises:
        RecipeError: the function of ``[sensitivity]`` cannot be imported.
        DataError: the file of names of ``[sensitivity]`` is unusable.
        ModelError: the recipe has ``[sensitivity]``, but the tokenizer does not support it.
    """
    if recipe.sensitivity is None:
        return Records(folder)
    if not tokenizer.is_fast:
        raise ModelError(
            "[sensitivity] needs a fast tokenizer, which maps tokens to characters; this model has a slow one",
            remedy="use a model folder with a tokenizer.json, or remove [sensitivity] from the recipe",
        )

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return text

    return Records(folder, Sensitivity(recipe.sensitivity), decode)


def load_data(recipe: Recipe, name: str, silo: Silo) -> SiloData:
    """The silo's rows from the recipe's files. They are added to the silo's records.

    Raises:
        DataError: a file is unusable, or the silo's own sensitivity function failed.
    """
    records = silo.boundary.records
    data = SiloData(recipe.party(name), recipe, silo.tokenizer, records.sensitivity)
    records.add_rows([*data.train, *data.held_out], data.train, recipe.boundary.tail)
    return data


def load_ends(checkpoint: Checkpoint, recipe: Recipe, device: torch.device = CPU) -> tuple[Part, Part]:
    """Bottom and top with initial adapters, on this device.

    Raises:
        ModelError: the checkpoint is incomplete, or the recipe's adapters do not fit it.
        CutError: the recipe's cut does not fit the model.
    """
    cut = Cut(recipe.model.bottom, recipe.model.top)
    dtype = getattr(torch, recipe.model.dtype)
    bottom = load_part(checkpoint, cut, "bottom", dtype=dtype, device=device)
    top = load_part(checkpoint, cut, "top", dtype=dtype, device=device, tied=bottom)
    for part in (bottom, top):
        adapters.add_trained_layers(part, recipe)
    return bottom, top


def greeting(checkpoint: Checkpoint, recipe: Recipe) -> pb.Hello:
    """The first frame to the trunk: what the parties must share (``hello_of``), and the model's fingerprint."""
    hello = hello_of(recipe, checkpoint)
    hello.fingerprint = checkpoint.fingerprint
    return hello


def connect(
    recipe: Recipe, name: str, service: str, address: str, hello: pb.Hello | None = None, *, server: str | None = None
) -> GrpcChannel:
    """A channel from a silo to a server.

    Args:
        name: the silo's name, which selects its certificate.
        service: gRPC service, ``"Trunk"`` or ``"Root"``.
        hello: first frame of the connection; None: that to a root or an edge.
        server, address: as in ``GrpcChannel``.

    Raises:
        IsthmusError: the silo's certificate is missing or unusable.
    """
    identity = Identity.load(Path(recipe.wire.certificates), name)
    return GrpcChannel(
        address,
        service,
        identity,
        server=server,
        greeting=hello or hello_of(recipe),
        deadline=recipe.wire.deadline,
        limit=recipe.wire.max_frame_bytes,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with padding on the left and a padding token.

    Raises:
        ModelError: the folder has no usable tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"no usable tokenizer in {folder}", remedy="copy the model's tokenizer files there") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_released(recipe: Recipe, bottom: Part, checkpoint: Checkpoint, folder: Path | None) -> Released | None:
    """The silo's released examples in this folder or in a temporary one; None without ``boundary.release_once``."""
    if not recipe.boundary.release_once:
        return None
    if folder is not None:
        return Released(folder, bottom, recipe, checkpoint.fingerprint)
    temporary = tempfile.mkdtemp(prefix="isthmus-released-")
    released = Released(Path(temporary), bottom, recipe, checkpoint.fingerprint)
    weakref.finalize(released, shutil.rmtree, temporary, ignore_errors=True)
    return released
