"""A finished run in use: its whole adapter, its export, answers and drafts. The trunk serves in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from isthmus.engines import use
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address, create_run
from isthmus.engines.roles import start_server
from isthmus.errors import ModelError, RecipeError, RunError
from isthmus.privacy.ledger import read_ledger
from isthmus.recipe import Recipe
from isthmus.storage.record import RunDirectory
from tests.integration.processes import rows_of, train_here, write_federation

PROMPT = str(rows_of("north")[0]["text"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Of one short round."""
    folder = tmp_path_factory.mktemp("federation")
    recipe = Recipe.read(write_federation(folder, train={"rounds": 1, "steps": 2, "evaluate": False}))
    made = create_run(recipe, folder / "run")
    train_here(made)
    return made


@pytest.fixture(autouse=True)
def trunk_here(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def serving(run: RunDirectory) -> Iterator[tuple[None, str]]:
        recipe = run.recipe()
        make_certificates(recipe, Path(recipe.wire.certificates))
        server, services = start_server(at_address(recipe, "localhost:0"), run, ("trunk",))
        yield None, f"localhost:{server.port}"
        server.stop()
        services["Trunk"].stop()  # type: ignore[attr-defined]

    monkeypatch.setattr(use, "serving", serving)


def test_the_whole_adapter_is_that_of_bottom_trunk_and_top(run: RunDirectory) -> None:
    rounds, tensors = use.whole_adapter(run)
    assert rounds == 1
    blocks = {int(name.split("layers.")[1].split(".")[0]) for name in tensors}
    assert blocks == set(range(5))
    shared = run.role("root").load_round(1)["shared"]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in shared.items())


def test_an_export_is_a_peft_folder(run: RunDirectory, tmp_path: Path) -> None:
    assert use.export_adapter(run, tmp_path / "out") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_answers_are_streamed_returned_and_charged(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = run.role("north").path / "ledger.jsonl"
    before = len(list(read_ledger(ledger).releases()))
    answer = use.generate_text(run, PROMPT, None, max_new_tokens=3, chat=False)
    assert capsys.readouterr().out.strip() == answer.strip()
    assert len(list(read_ledger(ledger).releases())) > before


def test_a_draft_is_made_once_and_used_by_who_answers(run: RunDirectory) -> None:
    told: list[str] = []
    with use.opened(run, "south") as (silo, directory):
        assert use.draft_of(directory, silo) is None
    path = use.make_draft(run, "south", prompts=2, max_new_tokens=3, tell=told.append)
    assert told
    assert path.parent == run.role("south").path
    with use.opened(run, "south") as (silo, directory):
        assert use.draft_of(directory, silo) is not None


def test_a_run_without_a_finished_round_has_no_adapter(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished round"):
        use.export_adapter(RunDirectory.create(tmp_path / "new", run.recipe()), tmp_path / "out")


def test_a_narrow_boundary_cannot_be_exported(run: RunDirectory, tmp_path: Path) -> None:
    recipe = run.recipe()
    narrow = recipe.model_copy(update={"boundary": recipe.boundary.model_copy(update={"width": 4})})
    with pytest.raises(RunError, match="no adapter of the uncut model"):
        use.export_adapter(RunDirectory.create(tmp_path / "new", narrow), tmp_path / "out")


def test_a_chat_takes_a_template_and_a_silo_of_the_recipe(run: RunDirectory) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        use.generate_text(run, PROMPT, None, max_new_tokens=3, chat=True)
    with pytest.raises(RecipeError, match="no silo 'west'"):
        use.generate_text(run, PROMPT, "west", max_new_tokens=3, chat=False)
