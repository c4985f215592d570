"""A reward server: cross-model entropy over HTTP, for OpenRLHF's `--remote_rm_url` and others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from cme_reward import __version__
from cme_reward.config import CMEConfig
from cme_reward.reward import CrossModelEntropy
from cme_reward.server.direct import Direct, Way
from cme_reward.server.errors import HANDLERS, REFUSALS
from cme_reward.server.gate import Gate, GateState
from cme_reward.server.metrics import ServerMetrics
from cme_reward.server.models import (
    Health,
    RewardReply,
    RewardRequest,
    ScoreReply,
    ScoreRequest,
)
from cme_reward.server.service import Service
from cme_reward.server.settings import ServerSettings
from cme_reward.verifiers import Ensemble, Verifier
from cme_reward.verifiers.base import close
from cme_reward.verifiers.shared import shared


def create_app(
    verifier: Verifier | Ensemble,
    generator_tokenizer: Any,
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
    settings: ServerSettings = ServerSettings(),  # noqa: B008 (frozen)
    *,
    max_batch_tokens: int = 65_536,
    linger_seconds: float | None = None,
    padded_vocabulary: bool = False,
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
        padded_vocabulary: see `CrossModelEntropy`.
    """
    metrics = ServerMetrics()
    many = shared(
        verifier,
        observe=metrics.verifier_call,
        max_batch_tokens=max_batch_tokens,
        linger_seconds=_linger(verifier) if linger_seconds is None else linger_seconds,
    )
    scorer = CrossModelEntropy(
        many,
        generator_tokenizer,
        replace(config, level="token"),
        padded_vocabulary=padded_vocabulary,
    )
    service = Service(scorer, config.level, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        close(many)

    app = FastAPI(
        title="cme-reward",
        summary="Cross-model entropy rewards",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
    )
    state = GateState()
    app.state.gate = state
    app.state.verifier = many

    @app.post("/v1/score", response_model=ScoreReply, responses=REFUSALS)
    async def score(request: ScoreRequest) -> Response:
        """Rewards of responses, per token or per response."""
        return _json(await service.score(request))

    @app.post("/get_reward", response_model=RewardReply, responses=REFUSALS)
    async def get_reward(request: RewardRequest) -> Response:
        """OpenRLHF's remote reward: a number for each response."""
        return _json(await service.get_reward(request))

    ways = {"/v1/score": Way(ScoreRequest, score), "/get_reward": Way(RewardRequest, get_reward)}
    app.add_middleware(Direct, ways=ways)
    app.add_middleware(Gate, settings=settings, state=state, metrics=metrics)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    metrics.info.info({"version": __version__, "verifier": many.name})

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


def _linger(verifier: Verifier | Ensemble) -> float:
    """A verifier on the CPU shares its cores with the requests, and waits for more of them."""
    members = verifier.members if isinstance(verifier, Ensemble) else (verifier,)
    devices = [getattr(member, "device", None) for member in members]  # of those in this process
    return 0.25 if any(device is not None and device.type == "cpu" for device in devices) else 0.0


def _json(reply: dict[str, Any]) -> Response:
    body = json.dumps(reply, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body.encode(errors="replace"), media_type="application/json")
