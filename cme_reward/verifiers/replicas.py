"""Requests to the replicas of one engine: which replica, how often, and how long at most."""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import re
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import httpx

from cme_reward.errors import ConfigError, VerifierError
from cme_reward.verifiers.turns import Replica, Turns, any_left, troubles

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 16.0  # seconds

Exchange = Callable[..., Awaitable[Any]]


class Unreachable(Exception):
    """No usable answer: no connection, a broken one, or none in time. Worth another try."""


class Busy(Exception):
    """The server asks for patience (429) or has failed (5xx). Worth another try, later."""

    def __init__(self, message: str, pause: float) -> None:
        super().__init__(message)
        self.pause = pause


class Rejected(VerifierError):
    """The server understood the request and refuses it (4xx): another try gives the same."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} answered {status}: {message}")
        self.url, self.status, self.message = url, status, message


class Replicas:
    """A pool of servers that hold the same model. Lives in one event loop.

    Requests that share a key go to one replica while it is there; new keys to the one with the
    fewest requests in flight. Connection errors, replies cut short, 429 and 5xx are tried again,
    on other replicas too, until a request has spent `total_seconds` on its tries; other 4xx never.
    A replica that could not be reached serves again only after `prove` has passed: something else
    may have come up at its address.

    The time for which a request waits for its turn is none of its own, as long as others get
    their answers: a slow server is not a lost one. Where nobody gets any, all who wait give up
    together, after `total_seconds`.

    Args:
        urls: base URLs.
        prove: asks a replica by the `exchange` it is given; raises `Unreachable` or `Busy` for "not
            now", `VerifierError` for "never".
        headers: sent with each request.
        concurrency: most requests in flight per replica.
        request_seconds: longest wait for one reply.
        total_seconds: longest that one answer takes from its first try on, all tries together.
    """

    def __init__(
        self,
        urls: Sequence[str],
        prove: Callable[[Replica, Exchange], Awaitable[None]],
        *,
        headers: Mapping[str, str],
        concurrency: int,
        request_seconds: float,
        total_seconds: float,
    ) -> None:
        self.replicas = [Replica(checked_url(url)) for url in urls]
        self.headers = dict(headers)
        self.concurrency = concurrency
        self.request_seconds = request_seconds
        self.total_seconds = total_seconds
        self._prove = prove
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._changed = asyncio.Event()
        self._turns = Turns(self.replicas, self.concurrency, self.total_seconds)

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self.headers,
            timeout=httpx.Timeout(self.request_seconds, connect=min(10.0, self.request_seconds)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def forked(self) -> Replicas:
        """The same pool for a process that has forked off, whose connections are its own."""
        pool = copy.copy(self)
        vars(pool).pop("_client", None)
        pool.replicas = [replace(r, in_flight=0, recovery=None) for r in self.replicas]
        pool._start_afresh()
        return pool

    async def start(self, seconds: float) -> None:
        """Prove all replicas; come back once one is trusted and the others have answered or failed.

        Replicas that cannot be reached are left to recover by themselves, as long as another one
        is trusted.

        Raises:
            VerifierError: if a replica is refused, or none can be reached in time.
        """
        for replica in self.replicas:
            self._recover(replica, pause=0.0)
        first_tries = [r.recovery for r in self.replicas if r.recovery]
        await asyncio.wait(first_tries, timeout=FIRST_PAUSE)
        deadline = asyncio.get_running_loop().time() + seconds
        patience_shown = False
        while True:
            for replica in self.replicas:
                if replica.refused:
                    raise VerifierError(replica.refused)
            late = [r for r in self.replicas if not r.trusted]
            left = deadline - asyncio.get_running_loop().time()
            answered = all(r.trouble for r in late)
            if not late or (len(late) < len(self.replicas) and (answered or left <= 0)):
                break
            if left <= 0:
                raise VerifierError(
                    f"no verifier answers after {seconds:g} s; expected the URL of a server that "
                    f"runs: check it, and the network\n{troubles(self.replicas)}"
                )
            if not patience_shown and answered:
                patience_shown = True
                logger.warning("waiting up to %g s for\n%s", seconds, troubles(self.replicas))
            await self._change(min(left, 1.0))
        for replica in late:
            logger.warning("going on without %s until it answers: %s", replica.url, replica.trouble)

    async def post(
        self, request: Callable[[Replica], tuple[str, Any]], key: Hashable
    ) -> tuple[Replica, Any]:
        """Send the path and body that `request` makes for a replica.

        Returns:
            The replica that answered, and the JSON it answered with.

        Raises:
            Rejected: the server refuses the request.
            VerifierError: no answer in `total_seconds`, or every replica was refused.
        """
        clock = asyncio.get_running_loop().time
        left, pause = self.total_seconds, FIRST_PAUSE
        while True:
            for lost in self.replicas:
                if not lost.trusted:
                    self._recover(lost, pause=FIRST_PAUSE)
            replica = await self._turns.take(key)
            began = clock()
            try:
                async with asyncio.timeout(left):  # a try may not outlive the whole
                    reply = await self.exchange(replica, "POST", *request(replica))
                self._turns.answered()
                return replica, reply
            except Rejected:
                self._turns.answered()
                raise
            except TimeoutError:
                replica.trouble = f"no reply in the {self.total_seconds:g} s allowed in all"
                if left == self.total_seconds:  # it had all of them for this one try
                    self._lost(replica, replica.trouble)
            except Unreachable as error:
                self._lost(replica, str(error))
            except Busy as error:
                replica.trouble = str(error)
                self._turns.forget(key)
                # Jitter, so that requests refused together do not come back together.
                wait = max(error.pause, pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
                await asyncio.sleep(max(0.0, min(wait, left - (clock() - began))))
            finally:
                self._turns.give_back(replica)
            while not any(r.trusted for r in self.replicas) and any_left(self.replicas):
                if clock() - began >= left:
                    break
                await self._change(left - (clock() - began))
            left -= clock() - began
            if left <= 0:
                raise VerifierError(
                    f"no answer within {self.total_seconds:g} s\n{troubles(self.replicas)}"
                )

    async def exchange(self, replica: Replica, method: str, path: str, body: Any = None) -> Any:
        """One request, one reply, as JSON; no second try.

        Raises `Unreachable`, `Busy` or `Rejected`.
        """
        try:
            reply = await self._client.request(method, replica.url + path, json=body)
        except httpx.TransportError as error:  # no connection, broken, or too slow
            what = str(error) or type(error).__name__
            raise Unreachable(f"{what} ({type(error).__name__})") from error
        if reply.status_code == 429 or reply.status_code >= 500:
            raise Busy(f"answered {reply.status_code}: {_message(reply)}", _retry_after(reply))
        if reply.status_code != 200:
            raise Rejected(replica.url + path, reply.status_code, _message(reply))
        try:
            return reply.json()
        except ValueError as error:
            raise Unreachable(
                f"a reply of {len(reply.content)} bytes that is not JSON ({error})"
            ) from error

    async def close(self) -> None:
        tasks = [r.recovery for r in self.replicas if r.recovery]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _change(self, seconds: float) -> None:
        """Wait until a replica's standing changes, at most so long."""
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _lost(self, replica: Replica, trouble: str) -> None:
        if replica.trusted:  # others may have noticed before
            logger.warning("lost %s: %s", replica.url, trouble)
            replica.trusted = False
        replica.trouble = trouble
        self._recover(replica, pause=FIRST_PAUSE)

    def _recover(self, replica: Replica, pause: float) -> None:
        if replica.recovery is None and not replica.refused:
            replica.recovery = asyncio.ensure_future(self._recovery(replica, pause))

    async def _recovery(self, replica: Replica, pause: float) -> None:
        try:
            while True:
                await asyncio.sleep(pause)
                try:
                    await self._prove(replica, self.exchange)
                except (Unreachable, Busy) as error:
                    replica.trouble = str(error)
                    pause = min(max(2 * pause, FIRST_PAUSE), LONGEST_PAUSE)
                    continue
                except asyncio.CancelledError:
                    raise
                except BaseException as error:  # whatever it is, it must not go unseen
                    known = isinstance(error, VerifierError)
                    replica.refused = str(error) if known else f"{replica.url}: {error!r}"
                    logger.error("not used again: %s", replica.refused, exc_info=not known)
                else:
                    replica.trusted, replica.trouble = True, ""
                return
        finally:
            replica.recovery = None
            self._changed.set()
            self._turns.hand_out()


def checked_url(url: str) -> str:
    """The base URL, without the `/v1` that OpenAI clients want at its end."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{url!r} is no URL of a verifier server; expected for example http://localhost:8000"
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"the URL of {parts.hostname} holds a user name or password, which messages would "
            "show; put the key into the environment variable CME_API_KEY"
        )
    return re.sub(r"(/v1)?/*$", "", url)


def _message(reply: httpx.Response) -> str:
    """What a server says about an error, whichever way it puts it; at most a few lines."""
    try:
        said: Any = reply.json()
        for key in ("error", "message", "detail"):
            said = said.get(key, said) if isinstance(said, dict) else said
    except ValueError:
        said = reply.text
    return str(said).strip()[:500] or reply.reason_phrase


def _retry_after(reply: httpx.Response) -> float:
    try:
        return min(max(float(reply.headers.get("retry-after", 0)), 0.0), 60.0)
    except ValueError:  # a date: rare, and the usual pause will do
        return 0.0
