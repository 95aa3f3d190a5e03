"""What crosses, read off the wire: noised tensors and lengths, each noted in the ledger, and nothing else.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from isthmus.model import adapters
from isthmus.model.packing import Packing
from isthmus.model.split import SplitForCausalLM
from isthmus.privacy.ledger import MemoryLedger
from isthmus.recipe import Recipe
from isthmus.silo.boundary import Boundary
from isthmus.updates.flat import Layout
from isthmus.wire import codec, frames
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer, Channel
from tests.conftest import Split, make_recipe, outbound, save_tiny_model
from tests.oracle.twins import Inputs, prompts, ragged

FORWARD, GRADIENT, UPDATE = 0.03, 0.002, 0.5
NOISE = {"forward": {"noise": FORWARD}, "gradient": {"noise": GRADIENT}, "update": {"noise": UPDATE}}
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 40, "max_new_tokens": 40}
FIELDS: dict[type[Message], set[str]] = {
    pb.Forward: {"step", "lengths", "hidden", "train", "dropout", "examples", "answered"},
    pb.Keep: {"example", "hidden"},
    pb.Backward: {"step", "gradient", "reply", "ascent_pass", "keep"},
    pb.Decode: {"session", "step", "lengths", "hidden", "forget", "rows", "drafted"},
    pb.Matrix: {"codec", "rows", "width", "data"},
    pb.Begin: {"round", "participants", "open", "start", "digest", "steps", "published"},
    pb.Steps: {"count", "before", "total"},
    pb.Commit: {"round", "step", "weight", "optimizer", "scale"},
    pb.Optimizer: {
        *("kind", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "amsgrad"),
        *("momentum", "dampening", "nesterov", "fresh"),
    },
    pb.End: {"round"},
    pb.Close: {"session"},
    pb.Update: {"round", "weight", "tensors", "masked", "compressed", "quality", "learned", "silos"},
    pb.Deal: {"round", "sealed", "commitments"},
    pb.Agree: {"round", "signature"},
    pb.Reveal: {"round", "shares"},
    pb.Tensor: {"name", "shape", "data"},
    pb.Move: {"after", "tensors"},
}
"""Every field a silo can send after its greeting."""
HEADER = 48
"""Bytes of a frame beside payload and lengths, at most."""


class Wiretap:
    """A channel that keeps the bytes of every request and answer it passes on."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.sent: list[bytes] = []
        self.answers: list[Message] = []

    def submit(self, request: Message) -> Answer:
        self.sent.append(frames.wrap(request).SerializeToString())
        answer = self._channel.submit(request)
        answer.add_done_callback(lambda done: done.exception() or self.answers.append(done.result()))
        return answer

    def call(self, request: Message) -> Any:
        return self.submit(request).result()

    @property
    def requests(self) -> list[Message]:
        return [frames.checked(pb.Frame.FromString(data)) for data in self.sent]


@dataclass
class Tapped:
    """A split model whose wire is tapped, and the clean hidden states its bottom gave, packed."""

    model: SplitForCausalLM
    tap: Wiretap
    ledger: MemoryLedger
    clean: list[torch.Tensor] = field(default_factory=list)

    @property
    def boundary(self) -> Boundary:
        return self.model.boundary

    def keep_clean(self, module: Any, arguments: Any, inputs: dict[str, Any], output: Any) -> None:
        h_BLD = output.last_hidden_state.detach()
        mask = inputs.get("attention_mask")
        real = torch.ones(h_BLD.shape[:2]) if mask is None else mask[:, -h_BLD.shape[1] :]
        self.clean.append(Packing(real.bool()).pack(h_BLD))

    def released(self, kind: type[Message] | None = None) -> list[torch.Tensor]:
        """The matrices on the wire."""
        sent = [request for request in self.tap.requests if kind is None or isinstance(request, kind)]
        return [tensor_of(matrix) for matrix in map(matrix_of, sent) if matrix is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, **boundary: Any) -> Recipe:
    return make_recipe(folder, boundary=boundary, train={"steps": 3}, lora={"rank": 16})


def tapped(split: Split, recipe: Recipe, *, seed: int | None = 5) -> Tapped:
    """``seed`` of the noise; None leaves the boundary its own secret generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ledger = MemoryLedger()
    model, _ = split(recipe, ledger=ledger, generator=generator)
    found = Tapped(model, Wiretap(model.trunk.channel), ledger)
    model.trunk.channel = model.trunk.rounds._channel = found.tap
    model.bottom.family.backbone_of(model.bottom.model).register_forward_hook(found.keep_clean, with_kwargs=True)
    return found


@pytest.fixture
def noisy(split: Split, folder: Path) -> Tapped:
    return tapped(split, recipe_of(folder, **NOISE))


def matrix_of(request: Message) -> pb.Matrix | None:
    if isinstance(request, pb.Forward | pb.Decode):
        return request.hidden
    return request.gradient if isinstance(request, pb.Backward) else None


def tensor_of(matrix: pb.Matrix) -> torch.Tensor:
    return codec.decode(matrix, rows=matrix.rows, width=matrix.width, codec="fp32")


def assert_noised(released: list[torch.Tensor], clean: list[torch.Tensor], noise: float) -> None:
    """Each payload is the clean tensor plus noise of this deviation on all coordinates, none left as it was."""
    assert len(released) == len(clean) > 0
    assert all(torch.all(sent != own) for sent, own in zip(released, clean, strict=True))
    drawn = torch.cat([(sent - own).flatten() for sent, own in zip(released, clean, strict=True)])
    assert drawn.numel() > 2000
    assert drawn.std() == pytest.approx(noise, rel=0.04)
    assert abs(drawn.mean()) < 4 * noise / drawn.numel() ** 0.5


def train(silo: Tapped, steps: int = 3, side: str = "left") -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Training steps with the trunk; gives each batch and its clean loss gradient, packed."""
    silo.model.trunk.rounds.begin(1, ["a"])
    for number in range(1, steps + 1):
        batch = ragged(side, seed=number)
        silo.model(**batch).loss.backward()
        h_TD = tensor_of(next(a for a in reversed(silo.tap.answers) if isinstance(a, pb.Hidden)).hidden)
        yield batch, clean_gradient(silo.model, batch, h_TD)
        silo.model.trunk.rounds.commit(1, number, 7.0)


def clean_gradient(model: SplitForCausalLM, batch: Inputs, h_TD: torch.Tensor) -> torch.Tensor:
    packing = Packing(batch["attention_mask"].bool())
    h_BLD = packing.unpack(h_TD).requires_grad_(True)
    others = {key: value for key, value in batch.items() if key != "input_ids"}
    loss = model.top.model(inputs_embeds=h_BLD, use_cache=False, **others).loss
    return packing.pack(torch.autograd.grad(loss, h_BLD)[0])


def test_training_sends_noised_states_and_gradients_only(noisy: Tapped) -> None:
    gradients = [gradient for _, gradient in train(noisy)]
    assert_noised(noisy.released(pb.Forward), noisy.clean, FORWARD)
    assert_noised(noisy.released(pb.Backward), gradients, GRADIENT)
    assert [type(r) for r in noisy.tap.requests] == [pb.Begin] + [pb.Forward, pb.Backward, pb.Commit] * 3


@torch.no_grad()
def test_evaluation_sends_noised_states(noisy: Tapped) -> None:
    for seed in range(2):
        noisy.model(**ragged("right", seed), use_cache=False)
    assert_noised(noisy.released(pb.Forward), noisy.clean, FORWARD)
    assert not any(request.train for request in noisy.tap.requests)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"do_sample": True}, id="samples"),
    ],
)
def test_generation_sends_noised_states(noisy: Tapped, settings: dict[str, Any]) -> None:
    noisy.model.generate(**prompts(), **GREEDY | settings)
    assert_noised(noisy.released(pb.Decode), noisy.clean, FORWARD)


def test_prompt_lookup_sends_noised_states_for_drafts_too(noisy: Tapped) -> None:
    repeated = {key: value.repeat(1, 3) for key, value in prompts((12,)).items()}
    noisy.model.generate(**repeated, **GREEDY, prompt_lookup_num_tokens=4)
    assert_noised(noisy.released(pb.Decode), noisy.clean, FORWARD)
    assert max(len(h_TD) for h_TD in noisy.clean[1:]) > 1
    assert any(request.forget for request in noisy.tap.requests)


@torch.no_grad()
def test_greedy_sends_the_states_of_its_own_tokens(noisy: Tapped) -> None:
    """The clean states once more, computed without cache from the finished text."""
    tokens = noisy.model.generate(**prompts((70,)), **GREEDY)
    h_TD = noisy.model.bottom.hidden(input_ids=tokens, use_cache=False)[0, :-1]
    assert_noised([torch.cat(noisy.released(pb.Decode))], [h_TD], FORWARD)


def test_update_is_noised(noisy: Tapped) -> None:
    new = {name: tensor for part in noisy.model.ends for name, tensor in adapters.adapter_of(part).items()}
    layout = Layout.of(new)
    update = noisy.boundary.release_update(
        layout.row(new), 2, lambda row_P: pb.Update(tensors=codec.encode_named(layout.tensors(row_P)))
    )
    assert [tensor.name for tensor in update.tensors] == sorted(new)
    sent = codec.decode_named(update.tensors, {name: tuple(tensor.shape) for name, tensor in new.items()})
    assert_noised([sent[name] for name in sorted(new)], [new[name] for name in sorted(new)], UPDATE)


@torch.no_grad()
def test_noise_is_fresh_and_not_from_torchs_generator(split: Split, folder: Path) -> None:
    silo = tapped(split, recipe_of(folder, **NOISE), seed=None)
    for _ in range(2):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        silo.model(**ragged("left"), use_cache=False)
        assert torch.equal(torch.get_rng_state(), before)
    first, second = silo.released()
    assert torch.equal(silo.clean[0], silo.clean[1])
    assert torch.all(first != second)
    assert (first - second).std() == pytest.approx(FORWARD * 2**0.5, rel=0.1)


def test_ledger_and_frames_correspond_one_to_one(noisy: Tapped) -> None:
    list(train(noisy))
    noisy.model.generate(**prompts(), **GREEDY)
    paths = {pb.Forward: "forward", pb.Decode: "forward", pb.Backward: "gradient"}
    sent = [(type(r), r.step, matrix_of(r)) for r in noisy.tap.requests if matrix_of(r) is not None]
    on_wire = [(paths[kind], step, m.rows, m.width, len(m.data)) for kind, step, m in sent]
    assert [(r.path, r.step, r.rows, r.width, r.size) for r in noisy.ledger.releases] == on_wire
    assert {(r.path, r.clip, r.noise) for r in noisy.ledger.releases} == {
        ("forward", 0.0, FORWARD),
        ("gradient", 0.0, GRADIENT),
    }
    assert sum(noisy.boundary.released_bytes.values()) == sum(size for *_, size in on_wire)


def test_a_replayed_session_sends_the_same_bytes_and_releases_nothing_twice(split: Split, folder: Path) -> None:
    silo = tapped(split, recipe_of(folder, **NOISE))
    session = silo.model.trunk.open_session()
    for _ in range(2):
        session.step(outbound(session, torch.ones(3, 32)))
    silo.tap.call(pb.Close(session=session.id))  # as if the trunk had lost it
    session.step(outbound(session, torch.ones(3, 32)))
    first = [d for d in silo.tap.sent if frames.parse(d).HasField("decode")]
    assert first[3:] == first[:3]
    assert len(silo.ledger.releases) == 3


def test_frames_have_no_room_for_ids_labels_masks_or_positions(noisy: Tapped) -> None:
    for kind, names in FIELDS.items():
        assert {f.name for f in kind.DESCRIPTOR.fields} == names
    list(train(noisy))
    noisy.model.generate(**prompts(), **GREEDY, num_beams=2)
    for data, request in zip(noisy.tap.sent, noisy.tap.requests, strict=True):
        assert type(request) in FIELDS
        matrix = matrix_of(request)
        payload = len(matrix.data) if matrix else 0
        room = 3 * len(getattr(request, "lengths", ())) + 3 * len(getattr(request, "rows", ()))
        assert 0 < len(data) - payload <= HEADER + room


@pytest.mark.parametrize("grad", [False, True])
def test_without_noise_bits_cross_unchanged_and_padding_does_not(split: Split, folder: Path, grad: bool) -> None:
    silo = tapped(split, recipe_of(folder))
    with torch.set_grad_enabled(grad):
        for side in ("left", "right"):
            silo.model(**ragged(side), use_cache=False)
    left, right = silo.tap.requests
    assert list(left.lengths) == list(right.lengths) == [3, 40, 23]
    for sent, clean in zip(silo.released(), silo.clean, strict=True):
        assert torch.equal(sent, clean)
    assert [len(data) for data in silo.tap.sent] == [len(silo.tap.sent[0])] * 2
    first, second = silo.released()
    assert first == pytest.approx(second, abs=1e-6)  # attention sums in another order: the last bits may differ
    for request in (left, right):
        request.step = 1
        request.hidden.data = b""
    assert left == right


def test_without_noise_the_gradient_crosses_unchanged(split: Split, folder: Path) -> None:
    silo = tapped(split, recipe_of(folder))
    for _, gradient in train(silo, steps=1):
        assert torch.equal(silo.released(pb.Backward)[0], gradient)
