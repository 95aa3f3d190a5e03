"""A conversation: the answers of ``generate``, one session, and what it cost."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.data.templates import Turn, chat_example
from isthmus.data.tokens import prompt_tokens
from isthmus.errors import BudgetExhausted, DataError, ModelError
from isthmus.gateway import chat
from isthmus.gateway.chat import Conversation, privacy_line
from isthmus.model.checkpoint import Checkpoint
from isthmus.privacy.ledger import MemoryLedger
from isthmus.silo.join import Silo, greeting, join
from isthmus.storage.record import RoleDirectory
from isthmus.trunk.service import TrunkService
from isthmus.wire.channel import LoopbackChannel
from tests.conftest import make_recipe, save_tiny_model
from tests.integration.gateways import DP, TEMPLATE
from tests.oracle.test_drafts import draft_for

LONGEST = 8


def joined(folder: Path, **sections: object) -> Silo:
    recipe = make_recipe(save_tiny_model("llama", folder / "model"), **sections)
    service = TrunkService(recipe, RoleDirectory(folder / "trunk"))
    channel = LoopbackChannel(service, "a", greeting=greeting(Checkpoint(recipe.model.path), recipe))
    silo = join(recipe, "a", ledger=MemoryLedger(), channel=channel)
    silo.tokenizer.chat_template = TEMPLATE
    silo.model.generation_config.suppress_tokens = [0, 1, 2, 3]  # text has none of them: answers are read as written
    return silo


@pytest.fixture
def silo(tmp_path: Path) -> Iterator[Silo]:
    with joined(tmp_path) as found:
        yield found


def alone(silo: Silo, turns: list[Turn]) -> str:
    """The answer to these turns in a session of their own."""
    ids = prompt_tokens(chat_example(turns), silo.tokenizer)
    output = silo.model.generate(torch.tensor([ids]), max_new_tokens=LONGEST, do_sample=False, pad_token_id=0)
    return str(silo.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("system", ["", "w60 w61"])
def test_turns_go_on_with_one_session(drafting: bool, system: str, silo: Silo) -> None:
    """Answers are those of whole conversations, but only what is new crosses."""
    draft = draft_for(silo.model) if drafting else None
    conversation = Conversation(silo, draft, longest=LONGEST, system=system)
    turns, pieces = [Turn("system", system)] if system else [], list[str]()
    before = 0
    for text in ("w4 w5 w6", "w7 w8", "w9"):
        turns.append(Turn("user", text))
        expected = alone(silo, turns)
        before += len(prompt_tokens(chat_example(turns), silo.tokenizer)) + LONGEST
        pieces.clear()
        assert conversation.ask(text, pieces.append) == "".join(pieces) == expected
        turns.append(Turn("assistant", expected))
    releases = list(conversation._releases)
    rows = sum(release.rows for release in releases)
    if not drafting:
        assert rows < before
        assert rows == len(prompt_tokens(chat_example(turns[:-1]), silo.tokenizer)) + LONGEST - 1
    assert len({charge.record for release in releases for charge in release.charges}) == 1
    conversation.begin()
    assert conversation.ask("w4 w5 w6", pieces.append) == alone(
        silo, [*turns[: len(turns) - 6], Turn("user", "w4 w5 w6")]
    )
    assert conversation.charge.releases > len(releases)


def test_a_tail_is_a_prompts_so_each_turn_is_one(tmp_path: Path) -> None:
    with joined(tmp_path, boundary={"tail": 2}) as silo:
        conversation = Conversation(silo, longest=LONGEST)
        turns: list[Turn] = []
        for text in ("w4 w5 w6", "w7 w8"):
            turns.append(Turn("user", text))
            expected = alone(silo, turns)
            assert conversation.ask(text, lambda piece: None) == expected
            turns.append(Turn("assistant", expected))
        assert sum(release.rows for release in conversation._releases) == 2 * (2 + LONGEST - 1)


def test_a_budget_that_ends_leaves_the_conversation_as_it_was(tmp_path: Path) -> None:
    bounded = {"boundary": {"forward": DP, "gradient": DP}, "privacy": {"record_epsilon": 4.0, "delta": 1e-5}}
    with joined(tmp_path, **bounded) as silo:
        conversation = Conversation(silo, longest=100)
        with pytest.raises(BudgetExhausted):
            conversation.ask("w4 w5", lambda piece: None)
        assert conversation._turns == []
        assert conversation.charge.releases > 2
        assert f"since the start: {conversation.charge.releases} releases" in privacy_line(conversation.charge, silo)


def test_what_cannot_be_said_is_refused(silo: Silo) -> None:
    conversation = Conversation(silo, longest=LONGEST)
    with pytest.raises(DataError, match="surrogate"):
        conversation.ask("\ud800", lambda piece: None)
    with pytest.raises(DataError, match="too many for the model"):
        conversation.ask("w4 " * 600, lambda piece: None)
    assert conversation.ask("w4 w5 w6", lambda piece: None) == alone(silo, [Turn("user", "w4 w5 w6")])
    silo.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        Conversation(silo, longest=LONGEST)


def test_lines_of_a_pipe_are_turns_and_commands(silo: Silo, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    conversation = Conversation(silo, longest=LONGEST)
    for line in chat._lines(io.StringIO("w4 w5 w6\n\n/privacy\n/nothing here\n/new\n w4 w5 w6 \n")):
        chat._reply(conversation, silo, line, notes.append)
    first, privacy, again = capsys.readouterr().out.splitlines()
    assert first == again == alone(silo, [Turn("user", "w4 w5 w6")])
    assert privacy.startswith(f"since the start: {LONGEST} releases")
    assert notes == [f"no such command: /nothing. {chat.HELP}"]
    chat._reply(conversation, silo, "w4 " * 600, notes.append)
    assert "remedy: begin with /new" in notes[-1]
