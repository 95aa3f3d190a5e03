"""Every key of a recipe, changed at one party: refused by trunk and root with key and both values, or free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from isthmus.errors import MismatchError, ProtocolError
from isthmus.federation.aggregator import GreetedAggregator, root_service
from isthmus.model.checkpoint import Checkpoint
from isthmus.recipe import Recipe
from isthmus.recipe.section import Section
from isthmus.recipe.shared import FREE, SHARED
from isthmus.recipe.tree import ROOT
from isthmus.silo.join import greeting
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire import isthmus_pb2 as pb
from isthmus.wire.channel import LoopbackChannel, Service
from tests.conftest import make_recipe, save_tiny_model

OPTIONAL: dict[str, dict[str, Any]] = {
    "boundary.defence": {"answer": 0.5},
    "federation.noise": {"multiplier": 1.0},
    "federation.clip": {"norm": 0.5},
    "partition": {"data": "all.csv", "by": "field", "field": "ward"},
    "sensitivity": {"detectors": {"email": "high"}, "classes": {"high": {"noise": 2.0}}},
}
"""Tables that a recipe may leave out, with values; they need not be possible together: they are only compared."""
HARD = {"sensitivity.function": "mine.py:find"}
"""Values of keys whose type does not give one."""


def complete(recipe: Recipe) -> Recipe:
    """The recipe with all optional tables."""
    for key, values in OPTIONAL.items():
        *tables, name = key.split(".")
        section = Recipe
        for table in (*tables, name):
            section = next(one for one in _sections(section.model_fields[table].annotation))  # type: ignore[assignment]
        recipe = changed(recipe, key.split("."), section.model_validate(values))
    return recipe


def changed(section: Any, path: list[str], value: object) -> Any:
    """A copy of a table with another value at this path; of lists, in the first table."""
    name, *rest = path
    if not rest:
        return section.model_copy(update={name: value})
    inner = getattr(section, name)
    if isinstance(inner, tuple):
        new: object = (changed(inner[0], rest, value), *inner[1:])
    else:
        new = changed(inner, rest, value)
    return section.model_copy(update={name: new})


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for one in get_args(annotation):
        yield from _sections(one)


def keys_of(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """All keys of a table and its subtables."""
    for name, field in section.model_fields.items():
        found = list(_sections(field.annotation))
        if found and get_origin(field.annotation) is not dict:
            yield from keys_of(found[0], (*path, name))
        else:
            yield (*path, name), field


def another(field: FieldInfo, old: object) -> object:
    """A valid value of the key other than this one."""
    allowed: TypeAdapter[Any] = TypeAdapter(Any if field.annotation is None else field.rebuild_annotation())
    for one in candidates(field.annotation, old, field.examples or []):
        try:
            value = allowed.validate_python(one)
        except ValidationError:
            continue
        if value != old:
            return value
    raise AssertionError(f"no other value found for {old!r} of {field}: name one in HARD")


def candidates(annotation: Any, old: object, examples: list[Any]) -> Iterator[object]:
    yield from examples
    for one in (annotation, *get_args(annotation)):
        yield from (choice for choice in get_args(one) if isinstance(choice, str))
    if isinstance(old, bool):
        yield not old
    elif isinstance(old, int):
        yield old + 1
    elif isinstance(old, float):
        yield from (old / 2, 0.5, 0.25, 2.0)
    elif isinstance(old, str):
        yield from (f"{old}x", "localhost:9", "DE", "cuda")
    elif isinstance(old, tuple):
        yield from ((*old, "k_proj"), (*old, "localhost:9"))
    elif isinstance(old, dict):
        yield {}
    else:
        yield from (3, 0.5, "other")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    return make_recipe(folder, silos=("a", "b"), edge=[{"name": "e", "address": "localhost:1", "silos": ["a", "b"]}])


@pytest.fixture(scope="module")
def doors(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """A trunk and a root of the recipe. Their keys are compared with all tables there."""
    place = tmp_path_factory.mktemp("run")
    trunk = TrunkService(recipe, RoleDirectory(place / "trunk"))
    root = GreetedAggregator(recipe, ROOT, root_service(recipe, RoleDirectory(place / "root")))
    keys = dict(greeting(Checkpoint(recipe.model.path), complete(recipe)).keys)
    trunk._hello.keys.update(keys)
    root._keys = keys
    yield {"the trunk": trunk, "the root": root}
    trunk.stop()


KEYS = {".".join(path): (path, field) for path, field in keys_of(Recipe)}
del KEYS["lora.start"]  # needs a folder; it has a test of its own


@pytest.mark.parametrize("key", KEYS)
def test_a_party_that_differs_in_one_key(recipe: Recipe, doors: dict[str, Service], key: str) -> None:
    path, field = KEYS[key]
    whole = complete(recipe)
    old: Any = whole
    for name in path:
        old = getattr(old, name)
        old = old[0] if name in ("edge", "silo") else old
    new = HARD.get(key) or another(field, old)
    if key in ("model.path", "edge.name", "silo.name"):
        new = {"model.path": f"{recipe.model.path}/../{Path(recipe.model.path).name}"}.get(key, "z")
    hello = greeting(Checkpoint(recipe.model.path), changed(whole, list(path), new))
    for here, door in doors.items():
        if key in FREE:
            assert isinstance(door.handle("a", hello).result(), pb.Welcome)
            continue
        assert key in SHARED, f"see tests/unit/recipe/test_shared.py about {key}"
        with pytest.raises(MismatchError) as caught:
            door.handle("a", hello)
        assert path[-1] in caught.value.message
        assert here in caught.value.message
        if key not in ("edge.name", "silo.name"):
            plain = {"default": lambda one: one.model_dump(mode="json", exclude_none=True)}
            said = [json.dumps(one, sort_keys=True, **plain) if one is not None else "none" for one in (new, old)]  # type: ignore[call-overload]
            assert f"{said[0]}, {here} {said[1]}" in caught.value.message


@pytest.mark.parametrize("table", OPTIONAL)
def test_a_party_without_a_table_that_the_others_have(recipe: Recipe, doors: dict[str, Service], table: str) -> None:
    hello = greeting(Checkpoint(recipe.model.path), changed(complete(recipe), table.split("."), None))
    for door in doors.values():
        with pytest.raises(MismatchError, match=rf"{table}\.\w+ = none"):
            door.handle("a", hello)


def test_a_root_answers_after_hello_alone(recipe: Recipe, tmp_path: Path) -> None:
    root = GreetedAggregator(recipe, ROOT, root_service(recipe, RoleDirectory(tmp_path / "root")))
    assert LoopbackChannel(root, "e").call(pb.Ping()) == pb.Pong()
    with pytest.raises(ProtocolError, match="received Ready before Hello"):
        LoopbackChannel(root, "e").call(pb.Ready())
    hello = greeting(Checkpoint(recipe.model.path), recipe)
    waits = LoopbackChannel(root, "e", greeting=hello).submit(pb.Ready(silos=["a", "b"]))
    assert waits.result(10).round == 1  # type: ignore[attr-defined]
