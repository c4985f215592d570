"""Who gets in, how much of it, and what becomes of those who do not wait for their answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cme_reward.server.errors import log_refusal
from cme_reward.server.metrics import ServerMetrics
from cme_reward.server.settings import ServerSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SCORING = ("/get_reward", "/v1/score")
OPEN = ("/health", "/docs", "/openapi.json")
"""Paths that need no token: nothing of anyone's is behind them."""
_KNOWN = (*SCORING, *OPEN, "/metrics")
_PIECE = 64 * 1024  # bytes of a reply sent at a time


@dataclass
class GateState:
    """What a server holds at the moment; changed in the event loop's thread only."""

    draining: bool = False
    requests: int = 0
    bytes: int = 0
    lost: int = 0
    """Requests that the end of the process left without an answer."""
    typical_seconds: float = 1.0
    """Moving average of what an answer takes."""

    def retry_after(self) -> str:
        return str(min(60, max(1, math.ceil(self.typical_seconds))))


class _Refused(Exception):
    def __init__(self, status: int, error: str, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.error, self.detail, self.headers = status, error, detail, headers


class _Gone(Exception):
    """The client has closed the connection, or reads no more."""


class Gate:
    """ASGI middleware: access, limits, deadlines for slow clients, and draining.

    A request's body is read here, within the limits, before anything else sees it. A request whose
    client leaves is cancelled.
    """

    def __init__(
        self, app: Any, settings: ServerSettings, state: GateState, metrics: ServerMetrics
    ) -> None:
        self.app = app
        self.settings = settings
        self.state = state
        self.metrics = metrics
        metrics.in_flight.set_function(lambda: state.requests)
        metrics.held_bytes.set_function(lambda: state.bytes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path = scope["path"]
        reply = _Reply(send, self.settings.client_seconds)
        status = 500
        try:
            self._check_token(scope)
            if path in SCORING and scope["method"] == "POST":
                await self._admit(scope, receive, reply)
            else:
                await self.app(scope, receive, reply.send)
            status = reply.status
        except _Refused as refused:
            status = refused.status
            log_refusal(path, status, refused.detail)
            with suppress(_Gone):
                await reply.refuse(refused)
        except _Gone:
            status = 499  # what nginx reports for it
        except asyncio.CancelledError:
            if not self.state.draining or reply.started:
                raise
            # Out of time: the process ends, and who waited should know why.
            status = 503
            self.state.lost += 1
            with suppress(_Gone):
                await reply.refuse(self._shutting_down())
        finally:
            self._count(path if path in _KNOWN else "other", status, time.perf_counter() - started)

    def _count(self, path: str, status: int, seconds: float) -> None:
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        if path in SCORING and status == 200:
            self.state.typical_seconds += 0.1 * (seconds - self.state.typical_seconds)

    def _check_token(self, scope: Message) -> None:
        token = self.settings.token
        if token is None or scope["path"] in OPEN:
            return
        sent = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        if not any(hmac.compare_digest(c, token.encode()) for c in _credentials(sent)):
            raise _Refused(
                401,
                "Unauthorized",
                "this server wants a token; send it as `Authorization: Bearer TOKEN`, or as the "
                "password in the URL: http://cme:TOKEN@host:port/...",
                **{"WWW-Authenticate": "Bearer"},
            )

    async def _admit(self, scope: Message, receive: Receive, reply: _Reply) -> None:
        settings, state = self.settings, self.state
        if state.draining:
            raise self._shutting_down()
        length = _checked_length(scope, settings.max_body_bytes)
        if state.requests >= settings.max_requests:
            raise self._busy(f"{state.requests} requests")
        self._hold(1, 0)
        held = 0
        try:
            body = bytearray()
            self._hold(0, length)
            held = length
            deadline = asyncio.get_running_loop().time() + settings.client_seconds
            while True:
                message = await _by(deadline, receive(), settings.client_seconds)
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                if len(body) > settings.max_body_bytes:
                    raise _too_long(settings.max_body_bytes)
                if len(body) > held:  # of unknown length, it counts as it comes
                    self._hold(0, len(body) - held)
                    held = len(body)
                if not message.get("more_body", False):
                    break
            await self._answer(scope, bytes(body), receive, reply)
        finally:
            state.requests -= 1
            state.bytes -= held

    def _hold(self, requests: int, size: int) -> None:
        if self.state.bytes + size > self.settings.max_held_bytes:
            raise self._busy(f"{self.state.bytes:,} bytes of requests")
        self.state.requests += requests
        self.state.bytes += size

    def _shutting_down(self) -> _Refused:
        return _Refused(
            503,
            "ShuttingDown",
            "this server is shutting down; send the request to another one",
            **{"Retry-After": self.state.retry_after(), "Connection": "close"},
        )

    def _busy(self, held: str) -> _Refused:
        return _Refused(
            429,
            "TooManyRequests",
            f"this server is busy with {held}; try again in {self.state.retry_after()} s",
            **{"Retry-After": self.state.retry_after()},
        )

    async def _answer(self, scope: Message, body: bytes, receive: Receive, reply: _Reply) -> None:
        left = asyncio.ensure_future(_disconnected(receive))

        async def gone() -> Message:
            await left
            return {"type": "http.disconnect"}

        whole = {"type": "http.request", "body": body, "more_body": False}
        work = asyncio.ensure_future(self.app(scope, first(whole, gone), reply.send))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not reply.complete:
                raise _Gone
            await work
        finally:
            left.cancel()
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)


class _Reply:
    """Sends in pieces, so that a client which does not read is noticed, and not for ever."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self.seconds = seconds
        self.status = 500
        self.started = self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            await self._in_time(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        for at in range(0, max(len(body), 1), _PIECE):
            rest = more or at + _PIECE < len(body)
            piece = {"type": message["type"], "body": body[at : at + _PIECE], "more_body": rest}
            await self._in_time(piece)
            self.complete = not rest

    async def _in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await self._send(message)
        except TimeoutError:
            raise _Gone from None

    async def refuse(self, refused: _Refused) -> None:
        body = json.dumps({"error": refused.error, "detail": refused.detail}).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **refused.headers,
        }
        encoded = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        start = {"type": "http.response.start", "status": refused.status, "headers": encoded}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def first(message: Message, then: Receive) -> Receive:
    """To receive this message, and after it what `then` gives."""
    messages = iter([message])

    async def receive() -> Message:
        return next(messages, None) or await then()

    return receive


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _by(deadline: float, message: Awaitable[Message], seconds: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            return await message
    except TimeoutError:
        raise _Refused(
            408,
            "RequestTimeout",
            f"the body did not come within {seconds:g} s; send it faster, or in smaller requests",
            Connection="close",
        ) from None


def _credentials(header: bytes) -> list[bytes]:
    scheme, _, rest = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return [rest.strip()]
    if scheme.lower() == b"basic":
        with suppress(binascii.Error, ValueError):
            return [base64.b64decode(rest.strip(), validate=True).partition(b":")[2]]
    return []


def _checked_length(scope: Message, limit: int) -> int:
    """The length that the headers announce, 0 where they do not."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    # Web pages may send anything else to a server on their visitor's machine without being asked.
    if kind != b"application/json":
        raise _Refused(
            415,
            "UnsupportedMediaType",
            f"the content type is {kind.decode('latin-1')!r}; expected application/json",
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise _Refused(415, "UnsupportedMediaType", "compressed bodies are not read; send plain")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise _Refused(400, "BadRequest", f"the content length is {length!r}; expected a number")
    if int(length) > limit:
        raise _too_long(limit)
    return int(length)


def _too_long(limit: int) -> _Refused:
    return _Refused(
        413,
        "ContentTooLarge",
        f"the body is longer than {limit:,} bytes; send fewer responses at a time, or start the "
        "server with a larger --max-body",
    )
