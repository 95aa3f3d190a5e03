"""Joining a federation: building a silo's split model from a recipe and connecting it to the trunk.

A silo's ends and the trunk must have the adapters of the same round. ``join`` gets those of the trunk's round from the
root; ``connect_silo`` leaves the initial ones to its caller.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from isthmus.data.conversations import asked_example, asked_text
from isthmus.data.silo_data import SiloData
from isthmus.data.tokens import prompt_tokens
from isthmus.errors import IsthmusError, ModelError, RecipeError, RunError
from isthmus.model import adapters
from isthmus.model.agreement import hello_of
from isthmus.model.answers import KeptAnswers
from isthmus.model.bottleneck import Bottleneck
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, Part, load_part
from isthmus.model.device import CPU, find_device
from isthmus.model.recompute import return_large_tensors
from isthmus.model.rounded_linear import check_machine, round_table, round_weights
from isthmus.model.split import SplitForCausalLM
from isthmus.privacy.budget import Budget
from isthmus.privacy.ledger import Ledger, MemoryLedger
from isthmus.privacy.sensitivity import Sensitivity
from isthmus.recipe import Recipe, TaskSection
from isthmus.silo.accepted import AcceptedAdapters
from isthmus.silo.boundary import Boundary
from isthmus.silo.defence.guard import Guard
from isthmus.silo.defence.shield import Shield
from isthmus.silo.records import Records
from isthmus.silo.released import Released
from isthmus.silo.remote import RemoteTrunk
from isthmus.silo.rounds_client import RoundsClient
from isthmus.silo.secrets import open_ledger
from isthmus.silo.served import ServedRound, SharedAdapters, require_finished, same_run
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Channel
from isthmus.wire.client import GrpcChannel
from isthmus.wire.identity import Identity

FETCH_SECONDS = 10.0
"""Longest time that ``join`` tries to reach the root."""


@dataclass
class Silo:
    """A connected silo: its split model, tokenizer, boundary and clients of the trunk. A ``with`` block closes it."""

    name: str
    model: SplitForCausalLM
    tokenizer: PreTrainedTokenizerBase
    trunk: RemoteTrunk
    boundary: Boundary
    """The exit of all tensors, with the ledger and the privacy budget."""
    served: ServedRound = field(default_factory=ServedRound)
    """The round of the ends' adapters, which the trunk must serve."""
    task: TaskSection = field(default_factory=TaskSection)
    """How the recipe makes prompts."""
    resources: ExitStack = field(default_factory=ExitStack)
    """What ``close`` ends after the connection and the ledger, such as a trunk process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def prompt(self, asked: str | Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The prompt that a training row has, for the model's ``generate``: ``input_ids`` and ``attention_mask``,
        int64 ``[1, L]``.

        Args:
            asked: the text for the one field of the recipe's prompt or the user's turn, or a row's fields; of a
                conversation the turns so far.

        Raises:
            DataError: it does not fill the recipe's prompt, or cannot be read.
            ModelError: the recipe has conversations, and the model no chat template.
        """
        example = asked_text(asked, self.task) if isinstance(asked, str) else asked_example(asked, self.task)
        ids = torch.tensor([prompt_tokens(example, self.tokenizer)], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @property
    def rounds(self) -> RoundsClient:
        """Client of the trunk's rounds and optimizer steps."""
        return self.trunk.rounds

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
        """Close the connection to the trunk and the ledger, and end a trunk process that was started for this silo."""
        self.trunk.channel.close()
        self.boundary.ledger.close()
        self.resources.close()


def join(
    recipe: Recipe | Path | str,
    name: str,
    *,
    fresh: bool = False,
    run_dir: Path | str | None = None,
    ledger: Ledger | None = None,
    channel: Channel | None = None,
    releases: Path | None = None,
    records: Path | None = None,
    participants: Sequence[str] = (),
) -> Silo:
    """Load bottom and top with the adapters of the trunk's round and connect to the trunk.

    The adapters come from the root; a trunk that has not trained needs none. To use a run whose files are on this
    machine, call ``isthmus.open``.

    Args:
        recipe: the recipe, or its file.
        name: the silo's name in the recipe.
        fresh: keep the initial adapters, whatever the trunk has learned.
        run_dir: folder that remembers: ledger, privacy budgets, names of records, released examples.
        ledger: records releases; None: that of ``run_dir``, without one a ledger in memory.
        channel: a connection to the trunk; None: one to the recipe's address.
        releases: folder for released examples (``boundary.release_once``); None: a temporary folder, deleted at exit.
        records: folder for the key of record names and the noise scale; None: they end with the process.
        participants: names of the silos, this one included, whose own training loops step the trunk together; none:
            this silo's alone.

    Raises:
        RecipeError: the recipe has privacy budgets, but there is no ledger that remembers what was spent.
        RunError: the trunk has learned, and the root does not give the ends of that round; or the trunk trains.
        IsthmusError: the model folder, device, certificates or trunk cannot be used; its type says which.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    recipe.party(name)
    undo, directory = ExitStack(), None
    if run_dir is not None:
        run = RunDirectory(Path(run_dir).resolve())
        run.record(recipe)
        directory = run.role(name)
        if ledger is None:
            ledger = open_ledger(directory, recipe, name)
            undo.callback(ledger.close)
        releases, records = releases or directory.path / "released", records or directory.path / "records"
    elif ledger is None and _has_budgets(recipe):
        raise RecipeError(
            "the recipe sets privacy budgets, but without a ledger on disk nobody remembers what was spent",
            remedy="give join a run_dir, or open a finished run with isthmus.open",
        )
    with undo:
        silo = connect_silo(recipe, name, ledger=ledger, channel=channel, releases=releases, records=records)
        undo.callback(silo.close)
        if not fresh:
            _load_current(silo, recipe, directory)
        silo.rounds.participants = list(participants)
        undo.pop_all()
    return silo


def connect_silo(
    recipe: Recipe,
    name: str,
    *,
    ledger: Ledger | None = None,
    channel: Channel | None = None,
    releases: Path | None = None,
    records: Path | None = None,
    endless: bool = False,
) -> Silo:
    """A silo with initial adapters, whatever the trunk has learned (see ``join``).

    Args:
        endless: wait for the trunk until it is there.
    """
    recipe = recipe.of_silo(name, ranked=False)
    device = find_device(recipe.party(name).device)
    if recipe.party(name).recompute:
        return_large_tensors()
    checkpoint = Checkpoint(recipe.model.path)
    tokenizer = load_tokenizer(checkpoint.folder)
    bottom, top = load_ends(checkpoint, recipe, device, recipe.party(name).weights)
    served = ServedRound()
    if channel is None:
        hello = greeting(checkpoint, recipe)
        place, replicas = recipe.trunk.address, recipe.trunk.replicas
        opened = connect(recipe, name, "Trunk", place, hello, replicas=replicas, accept=served.check, endless=endless)
        served.connect(opened, hello)
        channel = opened
    ledger = ledger or MemoryLedger()
    silo_records = open_records(recipe, tokenizer, records)
    released, answers = _open_released(recipe, bottom, checkpoint, releases)
    boundary = Boundary(
        recipe.boundary,
        ledger,
        budget=Budget(recipe.privacy, ledger.history()),
        records=silo_records,
        released=released,
        answers=answers,
    )
    model = build_model(recipe, checkpoint, (bottom, top), channel, boundary)
    model.recompute = recipe.party(name).recompute
    assert isinstance(model.trunk, RemoteTrunk)
    model.trunk.rounds.served = served
    return Silo(name, model, tokenizer, model.trunk, boundary, served, recipe.task)


def load_shared(silo: Silo, shared: SharedAdapters) -> None:
    """Load a round's adapters into the silo's ends.

    Raises:
        RunError: the trunk serves another round or another run, or it trains.
    """
    welcome = silo.trunk.channel.welcome
    require_finished(welcome)
    if not same_run(welcome.run, shared.run):
        raise RunError(
            "the trunk is of another run than the silo's adapters",
            remedy="name the address of this run's trunk, or start it with 'isthmus trunk RUN_DIR'",
        )
    if welcome.completed != shared.completed:
        raise RunError(
            f"the trunk serves round {welcome.completed}, the silo has the adapters of round {shared.completed}",
            remedy=f"start the trunk with --round {shared.completed}, or reach the root for those of the trunk's round",
        )
    for part in silo.parts:
        adapters.load_adapter(part, shared.tensors)
    silo.served.set(welcome)


def accepted_adapters(recipe: Recipe, silo: Silo, directory: RoleDirectory | None) -> AcceptedAdapters:
    """What a silo whose adapters are still the initial ones accepts from the root.

    Args:
        directory: the silo's, in which earlier adapters may be kept.
    """
    initial = {name: one for part in silo.parts for name, one in adapters.trainable(part).items()}
    return AcceptedAdapters(recipe, initial, directory)


def fetch_shared(silo: Silo, recipe: Recipe, directory: RoleDirectory | None) -> SharedAdapters:
    """The shared adapters after the last finished round, from the root or the silo's edge.

    Args:
        directory: as of ``accepted_adapters``.

    Raises:
        IsthmusError: it cannot be reached, it has adapters of other shapes, or ones that the silo does not accept.
    """
    parent = recipe.tree.parent(silo.name)
    waits = recipe.waits
    limits = {"deadline": min(FETCH_SECONDS, waits.reach), "answer_deadline": min(waits.reach, waits.answer)}
    hasty = recipe.model_copy(update={"wire": recipe.wire.model_copy(update=limits)})
    channel = connect(hasty, silo.name, "Root", recipe.tree.node(parent).address, server=parent)
    try:
        answer: pb.Adapters = channel.call(pb.Current())
    finally:
        channel.close()
    tensors = codec.decode_named(answer.adapters, adapters.shared_shapes(silo.parts))
    shared = SharedAdapters(answer.completed, answer.run, tensors)
    accepted_adapters(recipe, silo, directory).accept(shared)
    return shared


def keep_shared(directory: RoleDirectory, shared: SharedAdapters) -> None:
    """Save the adapters of a round in the silo's directory, so that the silo can be opened when the root is gone."""
    if shared.completed and not _kept(directory, shared):
        directory.shared.save_round(shared.completed, {"shared": dict(shared.tensors), "run": shared.run})


def _load_current(silo: Silo, recipe: Recipe, directory: RoleDirectory | None) -> None:
    """Load the adapters of the trunk's round; the initial ones are right if the trunk has not trained.

    Args:
        directory: where they are kept; None: nowhere.
    """
    welcome = silo.trunk.channel.welcome
    require_finished(welcome)
    if not welcome.completed:
        silo.served.set(welcome)
        return
    try:
        shared = fetch_shared(silo, recipe, directory)
        load_shared(silo, shared)
    except IsthmusError as error:
        raise RunError(
            f"the trunk has learned {welcome.completed} rounds, but {silo.name} has no adapters of that round: "
            f"{error.message}",
            remedy=f"open the silo's run directory with isthmus.open, or start {recipe.tree.parent(silo.name)}; "
            "fresh=True keeps untrained ends",
        ) from error
    if directory is not None:
        keep_shared(directory, shared)


def _has_budgets(recipe: Recipe) -> bool:
    classes = recipe.sensitivity.classes.values() if recipe.sensitivity is not None else ()
    return Budget(recipe.privacy).limited or any(one.epsilon is not None for one in classes)


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
    guard = None
    if section.defence is not None:
        table_VE = bottom.family.embedding_of(bottom.model).weight
        assert isinstance(table_VE, torch.Tensor)
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
    added = {name: parameter for part in ends for name, parameter in adapters.adapter_parameters(part).items()}
    lora = recipe.lora.model_dump(mode="json", include={"rank", "alpha", "targets"})
    cut = [recipe.model.bottom, recipe.model.top]
    trunk.stand_in.watch(added, {"base": checkpoint.fingerprint, "cut": cut, **lora})
    model.register_load_state_dict_pre_hook(trunk.stand_in.restore)
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
        DataError: a row or file is unusable, a token is not the model's, or the silo's own sensitivity function failed.
    """
    records = silo.boundary.records
    data = SiloData(recipe.party(name), recipe, silo.tokenizer, records.sensitivity)
    for one in data.sets:
        one.check_vocabulary(silo.model.config.vocab_size)
    records.add_rows(data.known_rows(), data.train, recipe.boundary.tail)
    return data


def load_ends(
    checkpoint: Checkpoint, recipe: Recipe, device: torch.device = CPU, weights: str | None = None
) -> tuple[Part, Part]:
    """Bottom and top with initial adapters, on this device.

    Args:
        weights: as ``silo.weights``.

    Raises:
        ModelError: the checkpoint is incomplete, or the recipe's adapters do not fit it.
        CutError: the recipe's cut does not fit the model.
        NotSupportedError: this machine does not compute with these weights.
    """
    if weights is not None:
        check_machine(weights, device, "silo")
    cut, first = Cut(recipe.model.bottom, recipe.model.top), device if weights is None else CPU
    dtype = getattr(torch, recipe.model.dtype)
    bottom = load_part(checkpoint, cut, "bottom", dtype=dtype, device=first)
    top = load_part(checkpoint, cut, "top", dtype=dtype, device=first, tied=bottom)
    layers = [list(part.plain_layers()) for part in (bottom, top)]
    for part in (bottom, top):
        adapters.add_trained_layers(part, recipe)
    if weights is not None:
        round_table(bottom, top, device)
        for part, own in zip((bottom, top), layers, strict=True):
            round_weights(part, own, weights, device)
    return bottom, top


def greeting(checkpoint: Checkpoint, recipe: Recipe) -> pb.Hello:
    """The first frame to the trunk: what the parties must share (``hello_of``), and the model's fingerprint."""
    hello = hello_of(recipe, checkpoint)
    hello.fingerprint = checkpoint.fingerprint
    return hello


def connect(
    recipe: Recipe,
    name: str,
    service: str,
    address: str,
    hello: pb.Hello | None = None,
    *,
    replicas: Sequence[str] = (),
    server: str | None = None,
    accept: Callable[[pb.Welcome], None] | None = None,
    endless: bool = False,
) -> GrpcChannel:
    """A channel from a silo to a server.

    Args:
        name: the silo's name, which selects its certificate.
        service: gRPC service, ``"Trunk"`` or ``"Root"``.
        hello: first frame of the connection; None: that to a root or an edge.
        server, address, replicas, accept, endless: as in ``GrpcChannel``.

    Raises:
        IsthmusError: the silo's certificate is missing or unusable.
    """
    identity = Identity.load(Path(recipe.wire.certificates), name, "silo")
    return GrpcChannel(
        address,
        service,
        identity,
        replicas=replicas,
        server=server,
        greeting=hello or hello_of(recipe),
        accept=accept,
        deadline=recipe.waits.reach,
        answer_deadline=recipe.waits.answer,
        endless=endless,
        limit=recipe.wire.max_frame_bytes,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with padding on the left and a padding token.

    Raises:
        ModelError: the folder has no usable tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no usable tokenizer in {folder}", remedy="copy the model's tokenizer files there") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_released(
    recipe: Recipe, bottom: Part, checkpoint: Checkpoint, folder: Path | None
) -> tuple[Released | None, KeptAnswers | None]:
    """The silo's released examples in this folder or in a temporary one, and the answers about them; None without
    ``boundary.release_once`` and ``boundary.differences``."""
    if not recipe.boundary.release_once:
        return None, None
    place = folder or Path(tempfile.mkdtemp(prefix="isthmus-released-"))
    released = Released(place, bottom, recipe, checkpoint.fingerprint)
    if folder is None:
        weakref.finalize(released, shutil.rmtree, place, ignore_errors=True)
    if not recipe.boundary.differences:
        return released, None
    return released, KeptAnswers(place / "answers", checkpoint.config.get_text_config().hidden_size)


def _kept(directory: RoleDirectory, shared: SharedAdapters) -> bool:
    """Whether these are the round's kept adapters: a run that went back to an earlier round has it once more."""
    with suppress(RunError):
        if shared.completed in directory.shared.rounds():
            kept = directory.shared.load_round(shared.completed)["shared"]
            return kept.keys() == shared.tensors.keys() and all(
                torch.equal(one, shared.tensors[name].cpu()) for name, one in kept.items()
            )
    return False
