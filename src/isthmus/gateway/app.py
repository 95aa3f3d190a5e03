"""The gateway's endpoints, as OpenAI's API has them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from isthmus.data.templates import Turn
from isthmus.errors import IsthmusError
from isthmus.gateway.answer_grammar import AnswerGrammar, GrammarReader
from isthmus.gateway.batcher import Batcher
from isthmus.gateway.documents import (
    ChatAnswer,
    CompletionAnswer,
    ErrorBody,
    HealthBody,
    ModelBody,
    ModelsBody,
)
from isthmus.gateway.exchange import ClientExchange, ClientGone, begun
from isthmus.gateway.generation import AnswerPiece, GenerationRequest
from isthmus.gateway.guard import OWNER
from isthmus.gateway.metrics import CONTENT_TYPE, GatewayMetrics
from isthmus.gateway.problems import Problem, problem_of
from isthmus.gateway.prompts import PromptReader, ReadPrompt
from isthmus.gateway.requests import ChatBody, CompletionBody, EmbeddingsBody, SampledBody, body_problem
from isthmus.gateway.responses import AnswerShape, ChatShape, CompletionShape, Envelope, event, merged_pieces

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Malformed, too long for the model, or not offered"},
    401: {"model": ErrorBody, "description": "No valid API key"},
    403: {"model": ErrorBody, "description": "Another host's name"},
    404: {"model": ErrorBody, "description": "No such model or path"},
    405: {"model": ErrorBody, "description": "Another method"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    415: {"model": ErrorBody, "description": "The body is no JSON"},
    429: {"model": ErrorBody, "description": "The privacy budget is spent"},
    500: {"model": ErrorBody, "description": "An error of the gateway"},
    503: {"model": ErrorBody, "description": "Too many requests wait, or the trunk is away"},
}
COMPILERS = 2
"""Threads that compile schemas."""
CLIENT_GONE = 499
"""Status, for nobody, of a request whose client has gone."""
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""A server-sent event: a chunk as JSON, or ``[DONE]``."""
EVENTS = {"text/event-stream": {"schema": EVENT}}


@dataclass
class ServedModel:
    """What the gateway serves."""

    name: str
    """Its id in requests."""
    owner: str
    """The silo's name."""
    fingerprint: str
    """Changes with the adapters."""
    created: int
    """When it was opened, in seconds since the epoch."""
    context: int
    """Most tokens of prompt and answer."""
    delta: float
    """The delta of all epsilons."""
    longest: int
    """Most tokens of an answer where the request does not say."""

    def body(self) -> dict[str, Any]:
        """As ``/v1/models`` has it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": self.owner}


class Endpoints:
    """The functions behind the paths."""

    def __init__(
        self,
        served: ServedModel,
        batcher: Batcher,
        reader: PromptReader,
        grammars: GrammarReader,
        metrics: GatewayMetrics,
    ) -> None:
        self._served, self._batcher, self._reader, self._grammars = served, batcher, reader, grammars
        self._metrics = metrics
        self._compiling = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation, in the model's own chat template."""
        self._check_model(body.model)
        roles = {"developer": "system"}
        turns = [Turn(roles.get(one.role, one.role), one.text) for one in body.messages]
        read = await self._read([partial(self._reader.conversation, turns)], "messages")
        grammar, owner = await self._grammar(body), getattr(request.state, OWNER, 0)
        asked = self._requests(body, read, body.longest, body.likeliest, grammar, owner)
        shape = ChatShape(self._envelope("chatcmpl"), self._reader.spelled, noted=body.logprobs)
        return await self._answer(body, asked, shape, request)

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Go on after prompts, which are taken as they are."""
        self._check_model(body.model)
        ways = [
            partial(self._reader.text, one) if isinstance(one, str) else partial(self._reader.ids, one)
            for one in body.prompts
        ]
        read = await self._read(ways, "prompt")
        grammar, owner = await self._grammar(body), getattr(request.state, OWNER, 0)
        asked = self._requests(body, read, body.max_tokens, body.logprobs, grammar, owner)
        shape = CompletionShape(self._envelope("cmpl"), self._reader.spelled, noted=body.logprobs is not None)
        return await self._answer(body, asked, shape, request)

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._served.body()]})

    async def model(self, name: str) -> Response:
        """The model of this name."""
        self._check_model(name)
        return JSONResponse(self._served.body())

    async def embed(self, body: EmbeddingsBody) -> Response:
        """Refused: the model writes text."""
        raise Problem(
            400,
            "embeddings are not offered: the model writes text, and its hidden states are the silo's own",
            code="unsupported",
        )

    async def health(self) -> Response:
        """Whether the gateway and the trunk are there, and how much they do."""
        if not self._batcher.open:
            raise Problem(
                503, "there is no connection to the trunk", type="trunk_unavailable", code="trunk_unavailable"
            )
        running, waiting = self._batcher.load
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def metrics(self) -> Response:
        """Counts, as Prometheus reads them."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    def _check_model(self, name: str) -> None:
        if name != self._served.name:
            raise Problem(
                404, f"there is no such model: {self._served.name!r} is served", param="model", code="model_not_found"
            )

    async def _read(self, ways: Sequence[Any], param: str) -> list[ReadPrompt]:
        """The prompts in tokens, read in another thread: a long text takes a while."""
        try:
            return await asyncio.to_thread(lambda: [way() for way in ways])
        except IsthmusError as error:
            problem = problem_of(error)
            problem.param = param
            raise problem from None

    async def _grammar(self, body: SampledBody) -> AnswerGrammar | None:
        """What the answers are held to. Schemas are compiled by few threads: others' requests go on meanwhile."""
        schema = body.schema_held
        if schema is None:
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compiling, self._grammars.read, schema)
        except IsthmusError as error:
            problem = problem_of(error)
            problem.param = "response_format"
            raise problem from None

    def _requests(
        self,
        body: SampledBody,
        prompts: Sequence[ReadPrompt],
        longest: int | None,
        likeliest: int | None,
        grammar: AnswerGrammar | None,
        owner: int,
    ) -> list[GenerationRequest]:
        settings = body.settings()
        if any(token >= self._reader.vocabulary for token in settings.logit_bias):
            raise Problem(400, f"token ids are 0 to {self._reader.vocabulary - 1}", param="logit_bias")
        if body.n > self._batcher.together:
            raise Problem(400, f"at most {self._batcher.together} answers are written at a time", param="n")
        return [
            GenerationRequest(
                one.ids,
                self._room(len(one.ids), longest),
                one.ends,
                body.stops,
                body.n,
                settings,
                likeliest,
                body.stream,
                grammar,
                owner,
            )
            for one in prompts
        ]

    def _room(self, prompt: int, longest: int | None) -> int:
        """Most tokens of an answer to a prompt of this many tokens."""
        room = self._served.context - prompt
        if room < (longest or 1):
            asked = "" if longest is None else f" and {longest:,} of the answer"
            raise Problem(
                400,
                f"the model's context has {self._served.context:,} tokens: too few for {prompt:,} of the prompt{asked}",
                param="messages",
                code="context_length_exceeded",
            )
        return min(room, self._served.longest) if longest is None else longest

    def _envelope(self, kind: str) -> Envelope:
        return Envelope(
            f"{kind}-{secrets.token_hex(12)}", int(time.time()), self._served.name, self._served.fingerprint
        )

    async def _answer(
        self, body: SampledBody, asked: Sequence[GenerationRequest], shape: AnswerShape, request: Request
    ) -> Response:
        exchange = ClientExchange(self._batcher, asked, request.receive, self._served.delta)
        try:
            if body.stream:
                pieces = await begun(exchange.pieces())
                usage = body.stream_options is not None and body.stream_options.include_usage
                events = self._counted(_events(pieces, exchange, shape, usage=usage), exchange)
                return StreamingResponse(events, media_type="text/event-stream")
            try:
                return await _whole(exchange, shape)
            finally:
                self._count(exchange)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)

    async def _counted(self, events: AsyncGenerator[str, None], exchange: ClientExchange) -> AsyncGenerator[str, None]:
        """The same events; at their end the answers are counted."""
        try:
            async with aclosing(events):
                async for one in events:
                    yield one
        finally:
            self._count(exchange)

    def _count(self, exchange: ClientExchange) -> None:
        self._metrics.note_answers(exchange.usage, exchange.charge.releases)


async def _whole(exchange: ClientExchange, shape: AnswerShape) -> Response:
    answers: dict[int, list[AnswerPiece]] = {}
    async for piece in exchange.pieces():
        answers.setdefault(piece.answer, []).append(piece)
    charge = exchange.charge
    merged = [merged_pieces(answers[number]) for number in sorted(answers)]
    return JSONResponse(shape.whole(merged, exchange.usage, charge.body()), headers=charge.headers())


async def _events(
    pieces: AsyncGenerator[AnswerPiece, None], exchange: ClientExchange, shape: AnswerShape, *, usage: bool
) -> AsyncGenerator[str, None]:
    """The events of a stream. The last chunk of all has what left the silo; it is known when all answers are whole."""
    begun_answers: set[int] = set()
    held: dict[str, Any] | None = None
    try:
        async for piece in pieces:
            if held is not None:
                yield event(held)
            held = shape.chunk(piece, first=piece.answer not in begun_answers)
            held |= {"usage": None} if usage else {}
            begun_answers.add(piece.answer)
            if piece.finish is None:
                yield event(held)
                held = None
        charge = exchange.charge.body()
        if held is not None:
            yield event(held if usage else held | {"privacy": charge})
        if usage:
            yield event(shape.last(exchange.usage, charge))
        yield event("[DONE]")
    except Problem as problem:
        if held is not None:
            yield event(held)
        yield event(problem.body())
    except ClientGone:
        return
    finally:
        await pieces.aclose()


def gateway_app(
    served: ServedModel, batcher: Batcher, reader: PromptReader, grammars: GrammarReader, metrics: GatewayMetrics
) -> FastAPI:
    """The endpoints as an application."""
    app = FastAPI(
        title="isthmus gateway",
        description="The part of OpenAI's API that a silo offers to its own people.",
        version="1",
        docs_url=None,
        redoc_url=None,
    )
    ends = Endpoints(served, batcher, reader, grammars, metrics)
    add = partial(app.add_api_route, response_class=JSONResponse)
    answered = {"content": {"application/json": {}, **EVENTS}, "description": "The answers, or a stream of chunks"}
    chat = {**ERRORS, 200: {**answered, "model": ChatAnswer}}
    completion = {**ERRORS, 200: {**answered, "model": CompletionAnswer}}
    add("/v1/chat/completions", ends.chat, methods=["POST"], responses=chat)
    add("/v1/completions", ends.complete, methods=["POST"], responses=completion)
    add("/v1/embeddings", ends.embed, methods=["POST"], responses=ERRORS)
    add("/v1/models", ends.models, methods=["GET"], responses={**ERRORS, 200: {"model": ModelsBody}})
    add("/v1/models/{name}", ends.model, methods=["GET"], responses={**ERRORS, 200: {"model": ModelBody}})
    add("/healthz", ends.health, methods=["GET"], responses={**ERRORS, 200: {"model": HealthBody}})
    app.add_api_route("/metrics", ends.metrics, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _response(problem: Problem) -> JSONResponse:
    return JSONResponse(problem.body(), problem.status, problem.headers)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _response(error)


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(body_problem(error.errors()[0]))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "there is no such path", 405: "there is no such method here", 400: "the body cannot be read"}
    headers = dict(error.headers or {})
    return _response(Problem(error.status_code, known.get(error.status_code, "refused"), headers=headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _response(Problem(500, "an error of the gateway", type="server_error"))
