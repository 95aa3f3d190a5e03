"""The gateway of a run: one process that is the silo, and answers its own people over HTTP."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from transformers import PreTrainedTokenizerBase

from isthmus.engines.inference import connected_silo, load_draft, stop_tokens
from isthmus.engines.process import LISTENING
from isthmus.errors import PeerGoneError, RecipeError, RunError
from isthmus.gateway.answer_grammar import GrammarReader
from isthmus.gateway.api_keys import ApiKeys
from isthmus.gateway.app import ServedModel, gateway_app
from isthmus.gateway.batcher import LOST_LOOK_SECONDS, Batcher
from isthmus.gateway.guard import GatewayGuard, is_own_name
from isthmus.gateway.metrics import GatewayMetrics
from isthmus.gateway.prompts import PromptReader
from isthmus.joining.keeper import kept_certificate
from isthmus.silo.join import Silo
from isthmus.storage.record import RoleDirectory, RunDirectory
from isthmus.tasks.greedy import Decode

log = logging.getLogger(__name__)
STOP_SECONDS = 10.0
"""Time that open connections have when the gateway stops."""


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway is started."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    """File of keys; None: nobody needs one, and the gateway listens on this machine alone."""
    together: int = 16
    waiting: int = 64
    longest: int = 1024
    """Most tokens of an answer where the request does not say."""
    conversations: int = 4
    """Most conversations whose sessions are kept after an answer, so that the next turn sends what is new alone; 0:
    none. Each holds the KV caches of one sequence, in the silo and on the trunk. None is kept longer than
    ``trunk.lease``, or given to another API key."""


def serve_gateway(
    run: RunDirectory,
    name: str | None,
    settings: GatewaySettings,
    *,
    trunk: str | None = None,
    round: str | int | None = None,
    notify: Callable[[str], None] = lambda message: None,
    announce: Callable[[str], None] = lambda message: None,
) -> None:
    """Serve a run's model until ``Stopped``. This thread computes, as it has loaded the model; another one serves.

    Args:
        name, trunk, round: as in ``opening.open_run``.
        notify: called with notes beside the output.
        announce: called with the address, once it answers, and what to do with it.

    Raises:
        IdentityError: the file of API keys is unusable.
        RecipeError: others could reach the gateway without a key.
        RunError: the port is taken; or as ``open_run``.
    """
    keys = None if settings.api_keys is None else ApiKeys.read(settings.api_keys)
    if keys is None and not is_own_name(settings.host):
        raise RecipeError(
            f"at {settings.host} other machines reach the gateway, and it has no API keys",
            remedy="give it --api-keys FILE, or leave out --host",
        )

    def opened() -> AbstractContextManager[tuple[Silo, RoleDirectory]]:
        return connected_silo(run, name, trunk=trunk, round=round, notify=notify)

    with bound(settings.host, settings.port) as listening, ExitStack() as serving:
        with opened() as (silo, directory):
            served = served_model(run, silo, settings.longest)
            batcher = Batcher(
                decoder(silo.tokenizer),
                together=settings.together,
                waiting=settings.waiting,
                conversations=settings.conversations,
                lease=run.recipe().trunk.lease,
            )
            metrics = GatewayMetrics(batcher)
            app = gateway_app(served, batcher, prompt_reader(silo), grammar_reader(silo), metrics)
            serving.enter_context(http_server(GatewayGuard(app, keys, metrics=metrics), listening))
            serving.callback(batcher.stop)
            certificates = Path(run.recipe().wire.certificates)
            serving.enter_context(kept_certificate(certificates, silo.name, "silo"))  # it runs for months
            announce(f"{LISTENING}{url_of(listening)}")
            announce(f"model: {served.name}; {'with' if keys else 'without'} API keys; stop with Ctrl-C")
            batcher.run(silo.model, load_draft(directory, silo))
        while True:
            log.warning("gateway: the trunk is gone; it is looked for until it is there")
            with _found_again(opened) as (silo, directory):
                served.fingerprint = fingerprint_of(silo)
                draft = load_draft(directory, silo)
                log.info("gateway: the trunk is there again")
                batcher.run(silo.model, draft)


@contextmanager
def _found_again(
    opened: Callable[[], AbstractContextManager[tuple[Silo, RoleDirectory]]],
) -> Iterator[tuple[Silo, RoleDirectory]]:
    """The silo, opened again as soon as there is a trunk."""
    with ExitStack() as stack:
        while True:
            try:
                found = stack.enter_context(opened())
                break
            except PeerGoneError:
                time.sleep(LOST_LOOK_SECONDS)
        yield found


def served_model(run: RunDirectory, silo: Silo, longest: int) -> ServedModel:
    """What requests and answers say of the model: its name is the run directory's."""
    return ServedModel(
        run.path.resolve().name,
        silo.name,
        fingerprint_of(silo),
        int(time.time()),
        silo.model.context,
        silo.boundary.budget.delta,
        longest,
    )


def fingerprint_of(silo: Silo) -> str:
    """Changes with the adapters: the run's name and the round."""
    welcome = silo.trunk.channel.welcome
    return f"{welcome.run[:8] or 'run'}-{welcome.completed}"


def prompt_reader(silo: Silo) -> PromptReader:
    """Makes prompts for this silo's model."""
    vocabulary: int = silo.model.config.get_text_config().vocab_size
    return PromptReader(silo.tokenizer, vocabulary, stop_tokens(silo.model, ()) or (), silo.task.system)


def grammar_reader(silo: Silo) -> GrammarReader:
    """Makes grammars for this silo's model."""
    return GrammarReader(silo.tokenizer, silo.model.config.get_text_config().vocab_size)


def url_of(listening: socket.socket) -> str:
    """The address that OpenAI's clients take as ``base_url``."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Token ids as text, without control tokens."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return decode


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        RunError: it cannot.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(found[4][:2], family=found[0], backlog=256)
    except OSError as error:
        raise RunError(
            f"the gateway cannot listen at {host}:{port}: {error.strerror or error}",
            remedy="another program may have the port: give another --port; 0 takes a free one",
        ) from error
    with listening:
        yield listening


@contextmanager
def http_server(app: ASGIApp, listening: socket.socket) -> Iterator[None]:
    """The application served from another thread while the block runs."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(STOP_SECONDS),
        lifespan="off",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="gateway", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(STOP_SECONDS + 1)
