"""The split cache: what changes rows or positions of the ends' layers changes the trunk's session alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.model.cache import SplitCache
from isthmus.model.checkpoint import Checkpoint
from isthmus.model.cut import Cut, load_part
from tests.conftest import save_tiny_model

LENGTH, ROWS = 5, 2


class Session:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def crop(self, positions: int) -> None:
        self.told.append(("crop", positions))

    def select(self, rows: list[int]) -> None:
        self.told.append(("select", rows))

    def close(self) -> None:
        self.told.append(("close", None))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(str(save_tiny_model("llama", tmp_path_factory.mktemp("model"))))


@pytest.fixture
def cache(checkpoint: Checkpoint) -> SplitCache:
    """With so many positions in all layers of both ends."""
    bottom, top = (load_part(checkpoint, Cut(1, 2), name) for name in ("bottom", "top"))  # type: ignore[arg-type]
    made = SplitCache(bottom, Session(), top)  # type: ignore[arg-type]
    states = torch.arange(ROWS, dtype=torch.float32).view(ROWS, 1, 1, 1).expand(ROWS, 2, LENGTH, 8).contiguous()
    for layer in made.layers:
        layer.update(states.clone(), states.clone())
    return made


def told(cache: SplitCache) -> list[tuple[str, Any]]:
    session: Any = cache.session
    return list(session.told)


def rows_of(cache: SplitCache) -> list[list[float]]:
    return [layer.keys[:, 0, 0, 0].tolist() for layer in cache.layers]


def test_it_holds_the_layers_of_both_ends(cache: SplitCache) -> None:
    assert (len(cache.bottom.layers), len(cache.top.layers), len(cache.layers)) == (1, 2, 3)
    assert cache.get_seq_length() == LENGTH


def test_positions_are_forgotten_on_the_trunk_too(cache: SplitCache) -> None:
    cache.add_crossed(torch.ones(ROWS, LENGTH, dtype=torch.bool))
    cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [LENGTH - 2] * 3
    assert told(cache) == [("crop", 2)]
    assert cache.add_crossed(torch.zeros(ROWS, 1, dtype=torch.bool)).shape == (ROWS, LENGTH - 1)
    cache.crop(0)
    assert len(told(cache)) == 1


def test_rows_are_chosen_on_the_trunk_too(cache: SplitCache) -> None:
    cache.reorder_cache(torch.tensor([1, 1]))
    assert rows_of(cache) == [[1.0, 1.0]] * 3
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert told(cache) == [("select", [1, 1]), ("select", [0, 0, 1, 1]), ("select", [0, 3])]


def test_a_transcript_is_kept_once_asked_for(cache: SplitCache) -> None:
    assert cache.transcript is None
    assert cache.start_transcript() is cache.start_transcript() is cache.transcript


def test_rows_that_are_not_there_are_refused(cache: SplitCache) -> None:
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([ROWS]))


def test_a_restart_drops_all_positions_and_the_session(cache: SplitCache) -> None:
    old: Any = cache.session
    transcript, new = cache.start_transcript(), Session()
    h_BLD = torch.zeros(ROWS, LENGTH, 4)
    transcript.add(h_BLD, h_BLD, torch.ones(ROWS, LENGTH, dtype=torch.bool))
    cache.add_crossed(torch.ones(ROWS, LENGTH, dtype=torch.bool))
    cache.drafted = True
    cache.restart(new)  # type: ignore[arg-type]
    assert old.told == [("close", None)]
    assert cache.session is new
    assert cache.get_seq_length() == cache.bottom.get_seq_length() == len(transcript) == 0
    assert cache.layers == [*cache.bottom.layers, *cache.top.layers]
    assert not cache.drafted
    assert cache.add_crossed(torch.ones(ROWS, 1, dtype=torch.bool)).shape == (ROWS, 1)


def test_drafts_are_known_to_both_ends(cache: SplitCache) -> None:
    for drafted in (True, False):
        cache.drafted = drafted
        assert [getattr(one, "drafted", None) for one in (cache, cache.bottom, cache.top)] == [drafted] * 3
