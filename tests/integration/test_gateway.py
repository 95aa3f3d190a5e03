"""The gateway as a process, used by OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI

import isthmus
from isthmus.engines.inference import PromptRequest, generate_text
from isthmus.storage.record import RunDirectory
from tests.integration.gateways import DP, Gateway, write_run
from tests.integration.processes import Commands, Ended, call, free_port, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]
KEY = "a-key-that-is-long-enough"
ASKED: list[Any] = [{"role": "user", "content": "w4 w5 w6 w7"}]
LONG: list[Any] = [{"role": "user", "content": "w4 " * 600}]
PROMPTS = [f"w{10 + number} w{20 + number} w{30 + 2 * number}" for number in range(16)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def gateway(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    commands = Commands(tmp_path_factory.mktemp("gateway"))
    yield Gateway(commands, run)
    commands.end()


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> OpenAI:
    return gateway.client()


def chat(client: OpenAI, **how: Any) -> Any:
    settings = {"model": "run", "messages": ASKED, "max_tokens": 12, "temperature": 0} | how
    return client.chat.completions.create(**settings)


def complete(client: OpenAI, prompt: Any, **how: Any) -> Any:
    return client.completions.create(**{"model": "run", "prompt": prompt, "max_tokens": 12, "temperature": 0} | how)


def generated(run: Path, asked: PromptRequest, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``isthmus generate`` answers."""
    text = generate_text(RunDirectory.open(run), asked, "north", max_new_tokens=12)
    capsys.readouterr()
    return text


@pytest.fixture(scope="module")
def copy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same federation, whose ledger no gateway holds."""
    return write_run(tmp_path_factory.mktemp("copy"))


def test_answers_are_those_of_generate(copy: Path, client: OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("w4 w5 w6 w7", "w33 w8"):
        spoken = chat(client, messages=[{"role": "user", "content": text}])
        assert spoken.choices[0].message.content == generated(copy, PromptRequest(text, chat=True), capsys)
        assert complete(client, text).choices[0].text == generated(copy, PromptRequest(text, raw=True), capsys)
    with isthmus.open(copy, "north") as silo:
        ids = silo.tokenizer("w33 w8")["input_ids"]
    assert complete(client, ids).choices[0].text == complete(client, "w33 w8").choices[0].text
    assert (spoken.choices[0].message.role, spoken.object, spoken.model) == ("assistant", "chat.completion", "run")


def test_turns_and_parts_are_read(client: OpenAI) -> None:
    """A conversation's texts may come in parts; a developer's turn is the system's."""
    turns: list[Any] = [
        {"role": "system", "content": "w40"},
        {"role": "user", "content": "w41"},
        {"role": "assistant", "content": "w42"},
        {"role": "user", "content": [{"type": "text", "text": "w43"}, {"type": "text", "text": "w44"}]},
    ]
    whole = complete(client, "w90 w40 w93 w91 w41 w93 w92 w42 w93 w91 w43 w44 w93 w92", max_tokens=8)
    for first in ("system", "developer"):
        turns[0]["role"] = first
        answer = chat(client, messages=turns, max_tokens=8)
        assert answer.choices[0].message.content == whole.choices[0].text
        assert answer.usage.prompt_tokens == whole.usage.prompt_tokens == 14


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    whole = chat(client, n=3, seed=5, temperature=1)
    chunks = list(chat(client, n=3, seed=5, temperature=1, stream=True, stream_options={"include_usage": True}))
    texts, ends = ["", "", ""], ["", "", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason or ""
        assert chunk.usage is None
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert chunks[-1].model_extra["privacy"] == whole.model_extra["privacy"]
    assert len({chunk.id for chunk in chunks}) == 1
    pieces = [chunk.choices[0].text for chunk in complete(client, "w4 w5", stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == complete(client, "w4 w5").choices[0].text


def test_stops_end_an_answer_before_them(client: OpenAI) -> None:
    words = complete(client, "w4 w5 w6").choices[0].text.split(" ")
    for stop, kept in ((words[5], 5), ([f" {words[3]} {words[4]}", "absent"], 3)):
        ended = complete(client, "w4 w5 w6", stop=stop)
        text, _, _ = " ".join(words).partition(stop if isinstance(stop, str) else stop[0])
        assert ended.choices[0].text == text
        assert ended.choices[0].finish_reason == "stop"
        assert ended.usage.completion_tokens <= kept + 2
        streamed = list(complete(client, "w4 w5 w6", stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_log_probabilities(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4, max_tokens=6)
    content = answer.choices[0].logprobs.content
    assert " ".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        best = [one.logprob for one in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, best[0])
        assert bytes(token.bytes).decode() == token.token
    plain = complete(client, "w4 w5 w6", logprobs=2, max_tokens=4).choices[0]
    assert plain.logprobs.text_offset == [0, *(len(" ".join(plain.text.split()[:n])) for n in (1, 2, 3))]
    assert [len(one) for one in plain.logprobs.top_logprobs] == [2] * 4
    assert all(
        max(one.values()) == own
        for one, own in zip(plain.logprobs.top_logprobs, plain.logprobs.token_logprobs, strict=True)
    )
    streamed = [chunk.choices[0] for chunk in chat(client, logprobs=True, max_tokens=6, stream=True)]
    assert [one.token for choice in streamed if choice.logprobs for one in choice.logprobs.content] == [
        one.token for one in content
    ]
    assert chat(client).choices[0].logprobs is None


def test_seeds_and_settings(client: OpenAI) -> None:
    def drawn(**how: Any) -> list[str]:
        return [choice.message.content for choice in chat(client, **{"temperature": 1, "n": 2, **how}).choices]

    assert drawn(seed=7) == drawn(seed=7) != drawn(seed=8)
    assert drawn(seed=7)[:1] == drawn(seed=7, n=1)
    assert drawn(seed=7)[0] != drawn(seed=7)[1]
    assert drawn(seed=7, top_p=1e-6) == [chat(client).choices[0].message.content] * 2
    assert drawn() != drawn()
    assert chat(client, logit_bias={"50": 100}, max_tokens=3).choices[0].message.content == "w50 w50 w50"
    varied = chat(client, frequency_penalty=2, logit_bias={"50": 4, "51": 3.5}, max_tokens=2).choices[0].message.content
    assert varied == "w50 w51"


def test_sixteen_at_once_are_sixteen_alone(client: OpenAI) -> None:
    def ask(number: int) -> tuple[str, str]:
        greedy = complete(client, PROMPTS[number], max_tokens=5 + number).choices[0].text
        drawn = "".join(
            chunk.choices[0].text
            for chunk in complete(client, PROMPTS[number], temperature=1, seed=number, max_tokens=20, stream=True)
        )
        return greedy, drawn

    alone = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(16))) == alone


def test_what_is_not_offered_is_refused_by_name(client: OpenAI) -> None:
    refused: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "functions": [{"name": "f"}],
        "reasoning_effort": "low",
        "store": True,
        "modalities": ["text", "audio"],
    }
    for name, value in refused.items():
        with pytest.raises(openai.BadRequestError) as found:
            chat(client, **{name: value})
        assert (found.value.param, found.value.code) == (name, "unsupported_parameter")
    for name, value in {"echo": True, "best_of": 3, "suffix": "w4"}.items():
        with pytest.raises(openai.BadRequestError) as found:
            complete(client, "w4", **{name: value})
        assert found.value.param == name
    with pytest.raises(openai.BadRequestError) as found:
        client.embeddings.create(model="run", input="w4")
    assert "embeddings are not offered" in found.value.message
    harmless = chat(client, response_format={"type": "text"}, store=False, user="someone", tool_choice="none")
    assert harmless.choices[0].message.content == chat(client).choices[0].message.content


@pytest.mark.parametrize(
    ("how", "error", "param", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 600}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"messages": LONG}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        ({"messages": [{"role": "robot", "content": "w4"}]}, openai.BadRequestError, "messages.0.role", None),
        ({"messages": [*ASKED, {"role": "assistant", "content": "w4"}]}, openai.BadRequestError, "messages", None),
        ({"temperature": 3}, openai.BadRequestError, "temperature", None),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", None),
        ({"n": 0}, openai.BadRequestError, "n", None),
        ({"n": 17}, openai.BadRequestError, "n", None),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs", None),
        ({"max_completion_tokens": 3}, openai.BadRequestError, "max_tokens", None),
        ({"stop": ["a"] * 5}, openai.BadRequestError, None, None),
        ({"seed": 2**64}, openai.BadRequestError, "seed", None),
        ({"logit_bias": {"97": 1}}, openai.BadRequestError, "logit_bias", None),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options", None),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "unknown_parameter"),
    ],
)  # fmt: skip
def test_errors_have_openais_shape(how: Any, error: Any, param: str | None, code: str | None, client: OpenAI) -> None:
    with pytest.raises(error) as found:
        chat(client, **how)
    assert found.value.body.keys() == {"message", "type", "param", "code"}
    assert found.value.type == "invalid_request_error"
    if param is not None:
        assert (found.value.param, found.value.code) == (param, code)


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("run", "north")
    assert client.models.retrieve("run") == model
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other")


def raw(gateway: Gateway, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """A request by hand: status, and the body's JSON."""
    address = urlsplit(gateway.url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "run", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "w4"}]}', 400),
        (b'{"\\ud800": 1}', 400),
        (b'{"model": "run", "messages": [{"role": "user", "content": "w4"}], "temperature": NaN}', 400),
        (b'{"model": "run", "messages": [{"role": "user", "content": "w4"}], "seed": 1e999}', 400),
        (b'{"model": "run", "messages": [{"role": "user", "content": "w4"}], "n": ' + b"9" * 5000 + b"}", 400),
        (b'{"x": "' + b"a" * 3_000_000 + b'"}', 413),
    ],
    ids=["empty", "cut", "no-utf8", "list", "null", "text", "deep", "surrogate", "model", "name", "nan", "inf", "long",
         "large"],
)  # fmt: skip
def test_malformed_bodies(body: bytes, status: int, gateway: Gateway) -> None:
    found, answer = raw(gateway, "POST", "/v1/chat/completions", body)
    assert found == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_only_this_machines_names_are_answered_without_keys(gateway: Gateway) -> None:
    """A page in a browser here could point a name of its own at this address."""
    assert raw(gateway, "GET", "/v1/models", Host="evil.example:80")[0] == 403
    assert raw(gateway, "GET", "/v1/models", Host="localhost:80")[0] == 200
    assert raw(gateway, "POST", "/v1/completions", b"{}", Content_Type="text/plain")[0] == 415
    assert raw(gateway, "GET", "/nowhere")[0] == 404
    assert raw(gateway, "DELETE", "/v1/models")[0] == 405
    assert raw(gateway, "GET", "/healthz")[1]["status"] == "ok"


def test_a_client_that_has_gone_is_not_computed_for(gateway: Gateway, client: OpenAI) -> None:
    """Neither a stream that is closed nor a request whose connection is."""
    endless = {"2": -100}
    stream = chat(client, stream=True, max_tokens=480, logit_bias=endless)
    next(iter(stream))
    stream.close()
    address = urlsplit(gateway.url)
    body = json.dumps({"model": "run", "prompt": "w4", "max_tokens": 490, "logit_bias": endless}).encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        time.sleep(0.1)
    until(lambda: raw(gateway, "GET", "/healthz")[1] == {"status": "ok", "running": 0, "waiting": 0}, "both to end")
    assert "gateway: POST /v1/completions: 499" in gateway.log


def test_nothing_that_was_said_is_logged(gateway: Gateway, client: OpenAI) -> None:
    secret = "w77 w78 w79 SecretWordOfAPatient"
    chat(client, messages=[{"role": "user", "content": secret}])
    with pytest.raises(openai.BadRequestError):
        chat(client, messages=[{"role": "user", "content": f"</s> {secret}" * 200}])
    with pytest.raises(openai.APIStatusError):
        client.models.retrieve("SecretWordOfAPatient")
    raw(
        gateway,
        "POST",
        "/v1/completions?q=SecretWordOfAPatient",
        b'{"model": "run", "prompt": "SecretWordOfAPatient", "x": ',
    )
    assert "gateway: POST /v1/chat/completions: 200" in gateway.log
    assert "SecretWord" not in gateway.log + gateway.command.stdout
    assert "Traceback" not in gateway.log


def test_keys(run: Path, tmp_path: Path, commands: Commands, copy: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\n\n{KEY}\nanother-key-long-enough\n")
    commands.run("gateway", copy, "--port", 0, "--api-keys", keys).failed("is open to others", f"chmod 600 {keys}")
    keys.chmod(0o600)
    gateway = Gateway(commands, copy, "--api-keys", keys, "--host", "0.0.0.0")
    gateway.url = gateway.url.replace("0.0.0.0", "127.0.0.1")
    assert chat(gateway.client(KEY), max_tokens=1).usage.completion_tokens == 1
    assert raw(gateway, "GET", "/v1/models", Host="north.example", Authorization=f"Bearer {KEY}")[0] == 200
    for wrong in ("another-key", KEY[:-1], KEY + "x", "ours"):
        with pytest.raises(openai.AuthenticationError) as found:
            chat(gateway.client(wrong))
        assert found.value.code == "invalid_api_key"
    assert raw(gateway, "GET", "/v1/models")[0] == 401
    assert raw(gateway, "GET", "/healthz")[0] == 200
    assert KEY not in gateway.log


def test_bad_starts(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> Ended:
        return call(capsys, monkeypatch, "gateway", *arguments)

    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.touch(mode=0o600)
    short.touch(mode=0o600)
    short.write_text("12345\n")
    start(copy, "--api-keys", empty).failed("holds no key")
    start(copy, "--api-keys", short).failed("fewer than 16 characters")
    start(copy, "--api-keys", tmp_path / "absent").failed("cannot be read")
    start(copy, "--host", "0.0.0.0").failed("has no API keys", "--api-keys")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := free_port()))
        taken.listen()
        start(copy, "--port", port).failed(f"cannot listen at 127.0.0.1:{port}", "another --port")
    start(tmp_path).failed()


def test_a_full_queue_turns_away(copy: Path, commands: Commands) -> None:
    client = Gateway(commands, copy, "--together", 1, "--waiting", 1).client()
    first = chat(client, stream=True, max_tokens=450, logit_bias={"2": -100})
    next(iter(first))
    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(chat, client, max_tokens=1) for _ in range(3)]
        errors = [other.exception() for other in others]
    turned = [error for error in errors if error is not None]
    assert len(turned) == 2
    for error in turned:
        assert isinstance(error, openai.InternalServerError)
        assert (error.status_code, error.code, error.response.headers["retry-after"]) == (503, "server_busy", "2")


def test_a_trunk_that_is_gone_is_named(commands: Commands, tmp_path: Path) -> None:
    """What is asked later is answered, as soon as there is a trunk again."""
    run = write_run(tmp_path / "federation", wire={"deadline": 1.0})
    gateway = Gateway(commands, run)
    client = gateway.client()
    before = chat(client)
    gateway.trunk().kill()
    with pytest.raises(openai.InternalServerError) as found:
        chat(client)
    assert (found.value.status_code, found.value.code) == (503, "trunk_unavailable")
    until(lambda: "the trunk is there again" in gateway.log, "the trunk", command=gateway.command)
    until(lambda: raw(gateway, "GET", "/healthz")[0] == 200, "requests to be taken", command=gateway.command)
    again = chat(client)
    assert again.choices == before.choices
    assert again.system_fingerprint == before.system_fingerprint
    gateway.command.process.terminate()
    assert gateway.command.wait().code == 130


ENDLESS = {"2": -100}
"""No end token, which noise would draw at times, so that an answer goes on until the budget ends it."""


def test_charges_and_budgets(tmp_path: Path, commands: Commands) -> None:
    """What an answer cost is in its headers; a spent budget is a 429 that clients do not try again."""
    run = write_run(
        tmp_path / "federation",
        boundary={"forward": DP, "gradient": DP},
        privacy={"record_epsilon": 4.0, "delta": 1e-5},
    )
    client = Gateway(commands, run).client()
    answer = client.chat.completions.with_raw_response.create(
        model="run", messages=ASKED, max_tokens=3, logit_bias=ENDLESS
    )
    charge = {name: answer.headers[f"x-isthmus-{name}"] for name in ("releases", "bytes", "epsilon", "delta")}
    body = answer.parse().model_extra["privacy"]
    assert charge["releases"] == "3"
    assert 1.0 < float(charge["epsilon"]) < 4.0
    assert float(charge["epsilon"]) == pytest.approx(body["epsilon"], rel=1e-5)
    assert (int(charge["bytes"]), float(charge["delta"])) == (body["bytes"], body["delta"])
    with pytest.raises(openai.RateLimitError) as found:
        chat(client, max_tokens=100, logit_bias=ENDLESS)
    assert (found.value.code, found.value.type) == ("privacy_budget_exhausted", "insufficient_quota")
    assert found.value.response.headers["x-should-retry"] == "false"
    spent = int(found.value.response.headers["x-isthmus-releases"])
    assert spent > 0
    with pytest.raises(openai.RateLimitError):
        chat(client, stream=True)
    other = [{"role": "user", "content": "w8 w9"}]
    chunks = chat(client, messages=other, max_tokens=100, stream=True, logit_bias=ENDLESS)
    pieces = []
    with pytest.raises(openai.APIError, match="privacy budget"):
        pieces += [chunk.choices[0].delta.content for chunk in chunks]
    commands.end()
    ledgers = RunDirectory.open(run).role("north").path / "ledger.jsonl"
    lines = [line for line in ledgers.read_text().splitlines() if '"release"' in line]
    assert len(lines) >= 3 + spent + 1


def test_a_conversation_in_a_pipe(copy: Path, gateway: Gateway, client: OpenAI) -> None:
    lines = "w4 w5 w6\nw7 w8\n/privacy\n/new\nw4 w5 w6\n/exit\nw9\n"
    command = [sys.executable, "-m", "isthmus", "chat", str(copy), "--max-new-tokens", "12"]
    found = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    first, second, privacy, again = found.stdout.splitlines()
    turns: list[Any] = [{"role": "user", "content": "w4 w5 w6"}]
    assert first == again == chat(client, messages=turns).choices[0].message.content
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "w7 w8"}]
    assert second == chat(client, messages=turns).choices[0].message.content
    assert privacy.startswith("since the start: 24 releases")


def test_a_chat_sends_what_is_new_alone(tmp_path: Path, commands: Commands) -> None:
    """Over HTTP, where each turn has the whole conversation; each API key has its own."""
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{KEY}\nanother-key-long-enough\n")
    run = write_run(tmp_path / "federation")
    told: dict[int, list[str]] = {}
    for kept in (2, 0):
        folder = Commands(tmp_path / f"kept-{kept}")
        client = Gateway(folder, run, "--api-keys", keys, "--conversations", kept).client(KEY)
        turns: list[Any] = []
        for text in ("w4 w5 w6", "w7 w8", "w9"):
            turns.append({"role": "user", "content": text})
            answer = chat(client, messages=turns, logit_bias={str(token): -100 for token in range(4)})
            turns.append({"role": "assistant", "content": answer.choices[0].message.content})
        told[kept] = [turn["content"] for turn in turns]
        usage, sent = answer.usage, answer.model_extra["privacy"]["bytes"]
        cached = usage.prompt_tokens_details.cached_tokens
        if kept:
            other = chat(client.with_options(api_key="another-key-long-enough"), messages=turns[:-1])
            assert other.usage.prompt_tokens_details.cached_tokens == 0
            assert cached >= usage.prompt_tokens - 6  # the answer's last token, its end, and the turn
            least = sent
        else:
            assert cached == 0
            assert sent > least * 2
        folder.end()
    assert told[2] == told[0]
