"""A reward server: cross-model entropy over HTTP, for OpenRLHF's `--remote_rm_url` and others."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from cme_reward import __version__
from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.conversation.rendered import RenderedReader, messages_from_label
from cme_reward.errors import InputError
from cme_reward.loading import end_of_turn
from cme_reward.reward import CrossModelEntropy
from cme_reward.server.errors import HANDLERS, REFUSALS
from cme_reward.server.gate import Gate, GateState
from cme_reward.server.metrics import MeteredVerifier, ServerMetrics
from cme_reward.server.models import (
    Health,
    RewardReply,
    RewardRequest,
    ScoreReply,
    ScoreRequest,
)
from cme_reward.server.settings import ServerSettings
from cme_reward.verifiers import Ensemble, Verifier
from cme_reward.verifiers.base import close
from cme_reward.verifiers.batching import BatchingVerifier

_AT_ONCE = 10_000
"""Characters that take less time to read than another thread takes to start."""
_LOGGED = (
    "token_reward_mean",
    "token_reward_std",
    "coverage",
    "dropped_nats",
    "verifier_tokens_per_token",
    "truncated",
    "repetition",
    "special_masked",
    "thinking_tokens",
    "thinking_unclosed",
)


def create_app(
    verifier: Verifier | Ensemble,
    generator_tokenizer: Any,
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
    settings: ServerSettings = ServerSettings(),  # noqa: B008 (frozen)
    *,
    max_batch_tokens: int = 65_536,
    linger_seconds: float | None = None,
) -> FastAPI:
    """The server as an ASGI application, to run under uvicorn or inside another one.

    Requests that wait for the verifier are scored together, rollouts of one prompt next to each
    other. The verifier is closed when the application ends.

    Args:
        verifier: see `load_verifier`.
        generator_tokenizer: of the model that samples the responses; its ids are scored, and its
            chat template wrote the prompts that OpenRLHF sends.
        config: see `CMEConfig`; `level` is the default of `/v1/score`.
        settings: limits and access.
        max_batch_tokens: see `BatchingVerifier`.
        linger_seconds: see `BatchingVerifier`. Default: 0.25 for a verifier on the CPU, which
            shares its cores with the requests, and 0 for others.
    """
    metrics = ServerMetrics()
    shared = _shared(verifier, metrics, max_batch_tokens, linger_seconds)
    scorer = CrossModelEntropy(shared, generator_tokenizer, replace(config, level="token"))
    service = _Service(scorer, config.level, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        close(shared)

    app = FastAPI(
        title="cme-reward",
        summary="Cross-model entropy rewards",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
    )
    state = GateState()
    app.state.gate = state
    app.state.verifier = shared
    app.add_middleware(Gate, settings=settings, state=state, metrics=metrics)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    metrics.info.info({"version": __version__, "verifier": shared.name})

    @app.post("/v1/score", response_model=ScoreReply, responses=REFUSALS)
    async def score(request: ScoreRequest) -> Response:
        """Rewards of responses, per token or per response."""
        return _json(await service.score(request))

    @app.post("/get_reward", response_model=RewardReply, responses=REFUSALS)
    async def get_reward(request: RewardRequest) -> Response:
        """OpenRLHF's remote reward: a number for each response."""
        return _json(await service.get_reward(request))

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 where requests are served, 503 where the server is shutting down."""
        status = "draining" if state.draining else "ok"
        reply = service.health() | {"status": status}
        return JSONResponse(reply, status_code=503 if state.draining else 200)

    @app.get("/metrics", response_class=Response, responses={401: REFUSALS[401]})
    async def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

        text = await asyncio.to_thread(generate_latest, metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return app


class _Service:
    """What the endpoints do, apart from HTTP."""

    def __init__(self, scorer: CrossModelEntropy, level: str, metrics: ServerMetrics) -> None:
        self.level = level
        self.scorer = scorer
        self.scorer._warned = True  # each reply says it for itself
        self.reader = RenderedReader(scorer.generator_tokenizer)
        self.metrics = metrics

    def health(self) -> dict[str, Any]:
        return {
            "verifier": self.scorer.verifier.name,
            "generator": str(getattr(self.scorer.generator_tokenizer, "name_or_path", "")),
            "max_length": min(member.max_length for member in self.scorer.members),
            "version": __version__,
        }

    async def score(self, request: ScoreRequest) -> dict[str, Any]:
        n = request.check()
        ids = request.response_ids
        if ids is None:
            ids = await asyncio.to_thread(self._ids, request.responses or [], request.append_eos)
        batch = await self.scorer.score_async(
            request.conversations(n), ids, request.response_masks, request.policy_logprobs
        )
        self.metrics.scored(batch)
        level = request.level or self.level
        reply = {
            "level": level,
            "verifier": self.scorer.verifier.name,
            "sequence_rewards": batch.sequence_rewards.tolist(),
            "token_rewards": None,
            "masks": None,
            "tokens": None,
            "dropped_nats": batch.dropped_nats.tolist(),
            "truncated": int(batch.metrics["truncated"]),
            "metrics": batch.metrics,
        }
        if level == "token":
            reply["token_rewards"] = _rows(batch.token_rewards, ids)
            reply["masks"] = _rows(batch.mask, ids)
        if request.return_tokens:
            reply["tokens"] = [self.scorer.table.tokens(row) for row in ids]
        return reply

    async def get_reward(self, request: RewardRequest) -> dict[str, Any]:
        request.check()
        labels = request.labels or [None] * len(request.query)
        # One by one, for metrics of each; the verifier scores them together.
        batches = await _all(
            self._rollout(k, *row)
            for k, row in enumerate(zip(request.query, request.prompts, labels, strict=True))
        )
        rewards = [float(batch.sequence_rewards[0]) for batch in batches]
        return {
            "rewards": rewards,
            "scores": [math.exp(reward) for reward in rewards],
            "extra_logs": {
                f"cme_{name}": [batch.metrics[name] for batch in batches]
                for name in (_LOGGED if batches else ())
            },
        }

    async def _rollout(self, k: int, query: str, prompt: str, label: Any) -> CMEBatch:
        def read() -> tuple[Any, list[int]]:
            ids = self.reader.ids(self.reader.response(query, prompt))
            messages = messages_from_label(label)
            return messages or self.reader.prompt(prompt), ids

        try:
            short = len(query) + len(prompt) < _AT_ONCE
            messages, ids = read() if short else await asyncio.to_thread(read)
        except InputError as error:
            raise InputError(f"query {k}: {error}") from error
        batch = await self.scorer.score_async([messages], [ids])
        self.metrics.scored(batch)
        return batch

    def _ids(self, texts: list[str], append_eos: bool) -> list[list[int]]:
        ending = [end_of_turn(self.scorer)] if append_eos else []
        return [row.tolist() + ending for row in self.scorer.table.encode_batch(texts).ids]


def _shared(
    verifier: Verifier | Ensemble,
    metrics: ServerMetrics,
    max_batch_tokens: int,
    linger_seconds: float | None,
) -> Verifier | Ensemble:
    """The verifier, or the members of an ensemble, for many requests at a time."""
    if isinstance(verifier, Ensemble):
        members = [
            _shared(member, metrics, max_batch_tokens, linger_seconds)
            for member in verifier.members
        ]
        return Ensemble([member for member in members if not isinstance(member, Ensemble)])
    if hasattr(verifier, "logprobs_async"):  # batches by itself
        return verifier
    metered = MeteredVerifier(verifier, metrics)
    if linger_seconds is None:
        device = getattr(verifier, "device", None)  # of verifiers in this process
        linger_seconds = 0.25 if device is not None and device.type == "cpu" else 0.0
    return BatchingVerifier(
        metered, max_batch_tokens=max_batch_tokens, linger_seconds=linger_seconds
    )


async def _all(coroutines: Any) -> list[Any]:
    """All results, or the first error and none of the rest left running."""
    coroutines = list(coroutines)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _rows(padded: Any, ids: list[list[int]]) -> list[list[Any]]:
    return [row[: len(i)] for row, i in zip(padded.tolist(), ids, strict=True)]


def _json(reply: dict[str, Any]) -> Response:
    body = json.dumps(reply, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body.encode(errors="replace"), media_type="application/json")
