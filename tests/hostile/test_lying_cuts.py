"""A silo greets with a cut that the recipe does not give it, to enter the trunk at another block."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from isthmus.errors import MismatchError
from isthmus.recipe import Recipe
from isthmus.recipe.shared import shared_keys
from isthmus.wire import isthmus_pb2 as pb
from tests.conftest import save_tiny_model
from tests.hostile.served import Served

SILOS = [{"name": "a", "train": "a.jsonl"}, {"name": "b", "train": "b.jsonl", "bottom": 2, "top": 2}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


def lie(served: Served, name: str, ends: tuple[int, int]) -> pb.Hello:
    hello: pb.Hello = served.hello("trunk")
    hello.bottom, hello.top = ends
    return hello


def test_a_silo_with_another_cut_than_its_own_is_refused(model: Path, tmp_path: Path) -> None:
    with Served(model, tmp_path, silo=SILOS) as served:
        for name, told in (("a", (2, 2)), ("b", (1, 1)), ("b", (3, 1)), ("a", (0, 9))):
            with pytest.raises(MismatchError, match=rf"{name} cuts at \({told[0]}, {told[1]}\), by the trunk's recipe"):
                served.channel("trunk", name, lie(served, name, told)).call(pb.Ping())
        for name in ("a", "b"):  # normal service goes on
            with closing(served.channel("trunk", name, lie(served, name, served.recipe.ends(name)))) as channel:
                assert channel.call(pb.Ping()) == pb.Pong()


def test_a_recipe_with_another_cut_is_refused_by_its_key(model: Path, tmp_path: Path) -> None:
    """Also by the root, and also if the silo greets with the right numbers."""
    with Served(model, tmp_path, silo=SILOS) as served:
        own = served.recipe.model_dump(mode="json", exclude_none=True)
        own["silo"][1]["bottom"] = 3
        for server in ("trunk", "root"):
            hello = served.hello(server)
            hello.keys.update(shared_keys(Recipe.of(own)))
            hello.bottom, hello.top = served.recipe.ends("b")
            with pytest.raises(MismatchError, match=r"b has silo\.b\.bottom = 3, the (trunk|root) 2"):
                served.channel(server, "b", hello).call(pb.Ping())
