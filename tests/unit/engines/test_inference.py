"""A finished run in use: answers and drafts. The trunk serves in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isthmus.engines import inference, opening
from isthmus.engines.certificates import make_certificates
from isthmus.engines.local import at_address
from isthmus.engines.roles import start_server
from isthmus.errors import ModelError, RecipeError
from isthmus.privacy.ledger import read_ledger
from isthmus.storage.record import RunDirectory
from tests.integration.processes import rows_of

PROMPT = str(rows_of("north")[0]["text"])


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

    monkeypatch.setattr(opening, "serving", serving)


def test_answers_are_streamed_returned_and_charged(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = run.role("north").path / "ledger.jsonl"
    before = len(list(read_ledger(ledger).releases()))
    answer = inference.generate_text(run, PROMPT, None, max_new_tokens=3, chat=False)
    assert capsys.readouterr().out.strip() == answer.strip()
    assert len(list(read_ledger(ledger).releases())) > before


def test_a_draft_is_made_once_and_used_by_who_answers(run: RunDirectory) -> None:
    told: list[str] = []
    with inference.connected_silo(run, "south") as (silo, directory):
        assert inference.load_draft(directory, silo) is None
    path = inference.make_draft(run, "south", prompts=2, max_new_tokens=3, notify=told.append)
    assert told
    assert path.parent == run.role("south").path
    with inference.connected_silo(run, "south") as (silo, directory):
        assert inference.load_draft(directory, silo) is not None


def test_a_chat_takes_a_template_and_a_silo_of_the_recipe(run: RunDirectory) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        inference.generate_text(run, PROMPT, None, max_new_tokens=3, chat=True)
    with pytest.raises(RecipeError, match="no silo 'west'"):
        inference.generate_text(run, PROMPT, "west", max_new_tokens=3, chat=False)
