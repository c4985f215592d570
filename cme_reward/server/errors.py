"""What the reward server says when it does not answer, to its clients and in its log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cme_reward.errors import CMEError, VerifierError
from cme_reward.server.models import PROMPT_FORMS, ChatMessage, Refusal, ScoreRequest

logger = logging.getLogger("cme_reward.server")

_LONGEST_DETAIL = 2000
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": description}
    for status, description in {
        400: "Not JSON.",
        401: "No token, or another one.",
        408: "The body came too slowly.",
        413: "The body is too long.",
        415: "Not application/json.",
        422: "JSON that says nothing that can be scored.",
        429: "Too much to do; Retry-After says when to come back.",
        500: "The verifier failed on this request.",
        503: "The server is shutting down.",
    }.items()
}


def log_refusal(path: str, status: int, detail: str) -> None:
    """One line, whatever a client has put into it: trainers show the status alone."""
    logger.warning("%s %d: %s", _one_line(path, 80), status, _one_line(detail, 600))


def _one_line(text: str, most: int) -> str:
    cut = text if len(text) <= most else text[:most] + " ..."
    return "".join(char if char.isprintable() else "\ufffd" for char in cut)


def _refusal(request: Request, status: int, error: str, detail: str) -> Response:
    # Half of a surrogate pair cannot be sent, and a name in the request can be of any length.
    detail = detail[:_LONGEST_DETAIL].encode(errors="backslashreplace").decode()
    log_refusal(request.url.path, status, detail)
    return JSONResponse({"error": error, "detail": detail}, status_code=status)


async def _failed(request: Request, error: Exception) -> Response:
    status = 500 if isinstance(error, VerifierError) else 422
    return _refusal(request, status, type(error).__name__, str(error))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """Its traceback is in the log; who asked learns its name alone."""
    return _refusal(request, 500, type(error).__name__, "an error in the server; see its log")


async def _other(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = _refusal(request, error.status_code, "HTTPError", str(error.detail))
    reply.headers.update(error.headers or {})
    return reply


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(e["type"] == "json_invalid" for e in found):
        first = found[0]
        detail = f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        return _refusal(request, 400, "InvalidJSON", detail)
    parts = []
    for e in found[:5]:
        path = [x for x in e["loc"][1:] if x not in PROMPT_FORMS]
        where = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in path)
        says = e["msg"]
        if e["type"] == "extra_forbidden":
            says = f"unknown field; known: {', '.join(_known_fields(e['loc']))}"
        parts.append(f"{where.lstrip('.') or 'the body'}: {says}")
    if len(found) > 5:
        parts.append(f"and {len(found) - 5} more")
    return _refusal(request, 422, "ValidationError", "; ".join(parts))


def _known_fields(location: Sequence[Any]) -> list[str]:
    model = ScoreRequest if len(location) == 2 else ChatMessage
    return list(model.model_fields)


HANDLERS: dict[Any, Any] = {
    RequestValidationError: _invalid,
    CMEError: _failed,
    HTTPException: _other,
    Exception: _unforeseen,
}
