"""The boundary: bounds what leaves, by path; counts it; and lets nothing out that the ledger did not take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import BudgetExhausted, DiskFullError, FrameError
from isthmus.privacy.accountant import Account
from isthmus.privacy.budget import Budget
from isthmus.privacy.events import ALL, Charge, Release
from isthmus.privacy.ledger import FileLedger, MemoryLedger, read_ledger
from isthmus.privacy.subjects import Subjects
from isthmus.recipe import BoundarySection, PrivacySection, ReleaseSection
from isthmus.silo.boundary import Boundary
from isthmus.silo.remote import PendingStep, RemoteTrunk
from isthmus.updates.flat import Layout
from isthmus.wire import codec
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import Answer
from tests.conftest import Split, make_recipe, save_tiny_model
from tests.oracle.twins import prompts, ragged


class Refusing:
    """A ledger that takes nothing."""

    def record(self, release: Release) -> None:
        raise DiskFullError("no room", remedy="make some")

    def history(self) -> Iterator[Release]:
        return iter(())

    def close(self) -> None: ...


def rows_of(rows: int, width: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def boundary_of(*, forward=(0.0, 0.0), gradient=(0.0, 0.0), update=(0.0, 0.0), **how) -> Boundary:  # type: ignore[no-untyped-def]
    """Clip and noise of each path."""
    paths = {"forward": forward, "gradient": gradient, "update": update}
    sections = {path: ReleaseSection(clip=clip, noise=noise) for path, (clip, noise) in paths.items()}
    return Boundary(BoundarySection(codec=how.pop("codec", "fp32"), **sections), **how)


def about(rows: int) -> Subjects:
    return Subjects(("record",), (rows,))


def sent(matrix: pb.Matrix) -> torch.Tensor:
    return codec.decode(matrix, rows=matrix.rows, width=matrix.width, codec=matrix.codec).float()


@settings(derandomize=True, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 40), st.floats(1e-3, 1e3), st.floats(0, 1e25), st.sampled_from(["fp32", "bf16"])
)
def test_clip_bounds_every_row(rows: int, width: int, clip: float, scale: float, name: str) -> None:
    boundary = boundary_of(forward=(clip, 0.0), codec=name)
    norms = sent(boundary.release(rows_of(rows, width, scale), "forward", 1, about(rows))).double().norm(dim=1)
    assert torch.all(norms <= clip * (1 + (1e-5 if name == "fp32" else 2**-8)))


def updated(boundary: Boundary, tensors: Mapping[str, torch.Tensor], step: int) -> pb.Update:
    """An open update of these tensors, in full, through the boundary."""
    layout = Layout.of(tensors)
    return boundary.release_update(
        layout.row(tensors), step, lambda row_P: pb.Update(tensors=codec.encode_named(layout.tensors(row_P)))
    )


def test_each_path_has_its_own_mechanism() -> None:
    ledger = MemoryLedger()
    boundary = boundary_of(forward=(1.0, 0.0), gradient=(0.5, 0.0), update=(0.0, 0.1), ledger=ledger)
    h_TD = rows_of(50, 8, 10.0)
    for path, clip in (("forward", 1.0), ("gradient", 0.5)):
        assert torch.allclose(sent(boundary.release(h_TD, path, 4, about(50))).norm(dim=1), torch.tensor(clip))
    update = updated(boundary, {"w": h_TD}, 2).tensors[0]
    drawn = torch.frombuffer(bytearray(update.data), dtype=torch.float32).view(50, 8) - h_TD
    assert drawn.std() == pytest.approx(0.1, rel=0.2)
    assert ledger.releases == [
        Release("forward", 4, 50, 8, 1.0, 0.0, 1600, charges=(Charge("record", math.inf),)),
        Release("gradient", 4, 50, 8, 0.5, 0.0, 1600, charges=(Charge("record", math.inf),)),
        Release("update", 2, 1, 400, 0.0, 0.1, 1600, charges=(Charge(ALL, math.inf),)),
    ]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(1e-2, 1e2), st.floats(1e-3, 1e3))
def test_an_update_is_clipped_as_a_whole(sizes: list[int], clip: float, scale: float) -> None:
    old = {f"layer{n}": rows_of(size, 3, 1.0, n) for n, size in enumerate(sizes)}
    new = {name: tensor + rows_of(*tensor.shape, scale, 9) for name, tensor in old.items()}
    learned = {name: new[name] - tensor for name, tensor in old.items()}
    frame = updated(boundary_of(update=(clip, 0.0)), learned, 1)
    found = codec.decode_named(frame.tensors, {name: tuple(tensor.shape) for name, tensor in old.items()})
    change = torch.cat([(new[name] - old[name]).flatten() for name in sorted(old)])
    expected = change * min(1.0, clip / float(change.norm()))
    assert torch.allclose(torch.cat([found[name].flatten() for name in sorted(old)]), expected, rtol=1e-4)


def test_bytes_are_counted_by_path_and_direction() -> None:
    boundary = boundary_of(codec="bf16")
    matrices = [boundary.release(torch.ones(3, 8), path, 1, about(3)) for path in ("forward", "forward", "gradient")]
    updated(boundary, {"a": torch.ones(2, 2), "b": torch.ones(5)}, 1)
    boundary.decode_reply(matrices[0], "forward", (3, 8), torch.ones(1))
    assert boundary.released_bytes == {"forward": 2 * 48, "gradient": 48, "update": 36}
    assert boundary.received_bytes == 48


def test_a_refusing_ledger_stops_every_release() -> None:
    boundary = boundary_of(ledger=Refusing())
    for release in (
        lambda: boundary.release(torch.ones(1, 2), "forward", 1, about(1)),
        lambda: boundary.release(torch.ones(1, 2), "gradient", 1, about(1)),
        lambda: updated(boundary, {"w": torch.ones(2)}, 1),
    ):
        with pytest.raises(DiskFullError):
            release()
    assert not boundary.released_bytes


@pytest.mark.parametrize("ledger", ["refusing", "full disk"])
def test_nothing_is_sent_that_the_ledger_did_not_take(split: Split, tmp_path: Path, ledger: str) -> None:
    taker = Refusing() if ledger == "refusing" else FileLedger(tmp_path / "ledger.jsonl")
    if isinstance(taker, FileLedger):
        os.dup2(os.open("/dev/full", os.O_WRONLY), taker._files[0])
    model, _ = split(make_recipe(save_tiny_model("llama", tmp_path / "model")), ledger=taker)
    trunk: RemoteTrunk = model.trunk
    before = trunk.channel.sent_bytes
    pending = PendingStep(1, "forward", Answer(), (1, 32), torch.ones(1), about(1), 32)
    for ask in (
        lambda: model(**ragged("left")),
        lambda: model.generate(**prompts(), max_new_tokens=2),
        lambda: trunk.send_gradient(pending, torch.ones(1, 32), reply=False),
    ):
        with pytest.raises(DiskFullError):
            ask()
    assert trunk.channel.sent_bytes == before
    assert not model.boundary.released_bytes


@pytest.mark.parametrize(
    ("shape", "name"), [((2, 8), "fp32"), ((3, 7), "fp32"), ((3, 8), "bf16"), ((8, 3), "fp32"), ((4, 6), "fp32")]
)
def test_admit_refuses_another_shape_or_codec(shape: tuple[int, int], name: str) -> None:
    with pytest.raises(FrameError):
        boundary_of().decode_reply(codec.encode(torch.ones(shape), name), "forward", (3, 8), torch.ones(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_admit_refuses_values_that_are_no_numbers(value: float) -> None:
    with pytest.raises(FrameError):
        boundary_of().decode_reply(codec.encode(torch.full((3, 8), value), "fp32"), "forward", (3, 8), torch.ones(1))


def test_admit_gives_the_dtype_of_what_was_sent() -> None:
    like = torch.ones(3, 8, dtype=torch.bfloat16)
    admitted = boundary_of().decode_reply(codec.encode(torch.full((3, 8), 0.5), "fp32"), "forward", (3, 8), like)
    assert admitted.dtype is torch.bfloat16
    assert torch.equal(admitted, like / 2)


def test_threads_that_release_at_once_keep_the_ledger_whole_and_the_budget(tmp_path: Path) -> None:
    """One record, whose budget allows ten releases; 8 threads try 40."""
    noised = {"mechanism": "gaussian", "clip": 1.0, "noise": 4.0}
    allowed = Account(10.5 * (2 * 1.0 / 4.0) ** 2).epsilon(1e-5).value
    ledger = FileLedger(tmp_path / "ledger.jsonl", silo="a")
    budget = Budget(PrivacySection(record_epsilon=allowed, delta=1e-5))
    boundary = Boundary(BoundarySection(forward=ReleaseSection(**noised)), ledger, budget=budget)

    def release(step: int) -> int:
        try:
            boundary.release(torch.ones(1, 8), "forward", step, about(1))
        except BudgetExhausted:
            return 0
        return 1

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(release, range(40))) == 10
    ledger.close()
    assert len(list(read_ledger(tmp_path / "ledger.jsonl").releases())) == 10
