"""The reward server as a process: sockets, signals, an end without a lost request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cme_reward.errors import ConfigError
from cme_reward.server.gate import GateState
from cme_reward.server.settings import ServerSettings

logger = logging.getLogger("cme_reward.server")
T = TypeVar("T")
_MOST_FRAMING = 64 * 1024
"""Bytes of a request besides its body."""
_CHUNK_FRAMING = 8
"""More of them for each byte of a body: it may come in chunks of a single one."""

_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "stream": "ext://sys.stderr",
        }
    },
    "loggers": {
        "cme_reward.server": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
    },
}


def bind(host: str, port: int) -> socket.socket:
    """The port, before minutes are spent on loading a model; it does not listen yet.

    Raises:
        ConfigError: if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another --port, or 0 for any free one"
        ) from error
    return bound


def run(app: Any, bound: socket.socket, settings: ServerSettings) -> int:
    """Serve until SIGTERM or SIGINT, and until what was accepted by then is answered.

    Returns:
        0, or 1 if the drain ran out of time.
    """
    _allow_many_connections()
    config = uvicorn.Config(
        app,
        http=_protocol(settings.client_seconds),
        ws="none",
        log_config=_LOGGING,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )
    server = _Server(config, app.state.gate, settings.drain_seconds)
    # What is loaded by now stays. Looking through it for garbage would hold up all requests.
    gc.collect()
    gc.freeze()
    server.run(sockets=[bound])
    return 1 if app.state.gate.lost else 0


class _Server(uvicorn.Server):
    """Goes on listening while it drains, to tell newcomers so; ends when all else is answered."""

    def __init__(self, config: uvicorn.Config, gate: GateState, drain_seconds: float) -> None:
        super().__init__(config)
        self.gate = gate
        self.drain_seconds = drain_seconds
        self.deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        logger.info("listening on http://%s:%d", host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.gate.draining:  # asked twice: at once, then
            self.deadline = 0.0
            return
        self.deadline = time.monotonic() + self.drain_seconds
        self.gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.gate.draining:
            late = time.monotonic() >= self.deadline
            self.should_exit = self.should_exit or late or self.gate.requests == 0
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.server_state.tasks:  # cancelled, they tell their clients so
            await asyncio.wait(self.server_state.tasks, timeout=5)
        say = logger.error if self.gate.lost else logger.info
        say("stopped, with %d requests unanswered", self.gate.lost)


def _protocol(seconds: float) -> type[HttpToolsProtocol]:
    """HTTP for clients that may stall: a connection without progress does not stay.

    The gate has its own deadlines for a request that it reads; this is for headers that do not end,
    for a body that nobody waits for any more, and for replies that are not read.
    """

    class Patient(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._stalled = 0
            self._framing = 0
            self._watch = self.loop.call_later(seconds, self._check)

        def connection_lost(self, exc: Exception | None) -> None:
            self._watch.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._framing += len(data)
            super().data_received(data)
            if self._framing > _MOST_FRAMING:  # the parser keeps headers of any length
                self.transport.abort()

        def on_message_begin(self) -> None:
            self._framing = 0
            super().on_message_begin()

        def on_body(self, body: bytes) -> None:
            self._framing -= (1 + _CHUNK_FRAMING) * len(body)
            super().on_body(body)

        def _check(self) -> None:
            waits = self.cycle is not None and not self.cycle.response_complete
            unread = self.transport.get_write_buffer_size() > 0
            idle = self.timeout_keep_alive_task is not None
            self._stalled = self._stalled + 1 if unread or not (waits or idle) else 0
            if self._stalled > 1:
                self.transport.abort()
                return
            self._watch = self.loop.call_later(seconds, self._check)

    return Patient


def _allow_many_connections() -> None:
    """A rollout batch may open a thousand connections, which is where many systems' limit is."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def in_a_passing_thread(make: Callable[[], T]) -> T:
    """The function's result, from a thread that ends with it.

    For processes whose verifier runs in a thread: on a CPU, OpenMP keeps threads for each thread
    that has ever used torch, and once these are more than cores, all of them wait asleep. Left
    over from loading, the main thread's made forward passes take 1.4 to 1.9 times as long.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(make())
        except BaseException as error:
            result.set_exception(error)

    # A daemon, so that Ctrl-C does not wait for the rest of the weights.
    threading.Thread(target=run, daemon=True).start()
    return result.result()
