"""A verifier behind HTTP: an engine that runs already, asked for log-probs of token ids."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from cme_reward._forks import renew_after_fork
from cme_reward.errors import ConfigError, VerifierError
from cme_reward.verifiers import sglang, vllm, vllm_generate
from cme_reward.verifiers.base import Closes, TokenIds
from cme_reward.verifiers.dialect import Dialect, NotScored, TextDialect, with_remedy
from cme_reward.verifiers.handshake import Handshake
from cme_reward.verifiers.replicas import Exchange, Rejected, Replica, Replicas

DIALECTS: dict[str, tuple[TextDialect, Dialect | None]] = {
    "vllm": (vllm, vllm_generate),
    "sglang": (sglang, None),
}
"""How each engine is asked, and how it is if it can do better."""
Result = TypeVar("Result")


class EndpointVerifier(Closes):
    """Scores responses on vLLM or SGLang servers, by token ids in both directions.

    Before a server is used, and again whenever it was out of reach, it has to prove that it runs
    the model that the local tokenizer belongs to, and that all replicas run the same one. Every
    id that comes back is compared with the one sent.

    Args:
        engine: "vllm" or "sglang".
        urls: base URLs of replicas of one model, such as `http://localhost:8000`, or of a router.
            The rollouts of one prompt go to the same replica.
        tokenizer: the model's fast tokenizer, or where to load it from. Default: the path or name
            that the server reports.
        model: the name the server knows the model by. Default: the only one it serves.
        max_length: most tokens of prompt and response. Default: the server's limit less one, as
            an engine generates at least one token.
        concurrency: most requests in flight per replica.
        request_seconds: longest wait for one reply.
        total_seconds: longest that one answer takes from its first try on, repeated tries and the
            waiting between them included. The time for which a request waits for its turn, behind
            `concurrency` others, counts only where no server answers anyone.
        start_seconds: longest wait for a first server when this is made.

    The API key is read from the environment variable `CME_API_KEY`. Calls may come from any threads
    and event loops, and from processes that have forked off, which open connections of their own.

    Raises:
        ConfigError: for an engine that is not known, or a URL that is none.
        VerifierError: if no server answers, or one runs another model or tokenizer.
    """

    def __init__(
        self,
        engine: str,
        urls: Sequence[str],
        *,
        tokenizer: Any = None,
        model: str | None = None,
        max_length: int | None = None,
        concurrency: int = 64,
        request_seconds: float = 300.0,
        total_seconds: float = 600.0,
        start_seconds: float = 30.0,
    ) -> None:
        if engine not in DIALECTS:
            raise ConfigError(f"{engine=}: expected one of {', '.join(map(repr, DIALECTS))}")
        if not urls or len(set(urls)) < len(urls):
            raise ConfigError(f"urls={list(urls)!r}: expected one or more different URLs")
        for name, value in (
            ("concurrency", concurrency),
            ("request_seconds", request_seconds),
            ("total_seconds", total_seconds),
            ("start_seconds", start_seconds),
        ):
            if not value > 0:
                raise ConfigError(f"{name}={value!r} must be positive")
        self._arguments = (
            (engine, tuple(urls)),
            {
                "model": model,
                "max_length": max_length,
                "concurrency": concurrency,
                "request_seconds": request_seconds,
                "total_seconds": total_seconds,
                "start_seconds": start_seconds,
            },
        )
        self.dialect, faster = DIALECTS[engine]
        self.name = f"{engine}:{','.join(urls)}"
        self._handshake = Handshake(self.dialect, faster, tokenizer, model)
        self._replicas = self._wait(self._connect(urls, start_seconds))
        self._close_when_forgotten()
        renew_after_fork(self, EndpointVerifier._renew)
        self.tokenizer = self._handshake.tokenizer
        self.vocab_size = len(self.tokenizer)
        limit = self._handshake.max_length
        if max_length is not None and max_length > limit:
            self.close()
            raise ConfigError(
                f"max_length={max_length}, but {self.name} takes at most {limit} tokens; lower it, "
                "or start the server with a longer context"
            )
        self.max_length = max_length or limit

    def __reduce__(self) -> tuple[Any, ...]:
        positional, keywords = self._arguments
        return _restore, (positional, {**keywords, "tokenizer": self.tokenizer})

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """Log-probs in nats, float32 `[S]` for each response; see `Verifier.logprobs`.

        All of them or none: an answer that is missing or wrong is never filled in.

        Raises:
            VerifierError: a server refuses a request, answers for other ids or with values that
                are not finite, or there was no answer within `total_seconds`. Names the response.
        """
        return self._wait(self._score(prompts, responses))

    async def logprobs_async(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """`logprobs` for callers with an event loop of their own, which it does not block."""
        future = asyncio.run_coroutine_threadsafe(self._score(prompts, responses), _event_loop())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Close the connections."""
        if self._finalizer.detach():
            self._wait(self._replicas.close())

    def _close_when_forgotten(self) -> None:
        # Recovery tasks hold on to the replicas, so nobody else would close what is forgotten.
        self._finalizer = weakref.finalize(self, _close_soon, self._replicas)
        self._finalizer.atexit = False

    def _renew(self) -> None:
        """In a process that has forked off: connections and waiters of its own."""
        if self._finalizer.detach():
            _left_behind.append(self._replicas)
            self._handshake.renew()
            self._replicas = self._replicas.forked()
            self._close_when_forgotten()

    async def _connect(self, urls: Sequence[str], start_seconds: float) -> Replicas:
        _, settings = self._arguments
        names = self.dialect.KEY_VARIABLES
        key = next((os.environ[name] for name in names if os.environ.get(name)), None)
        handshake = self._handshake

        # Without `self`, which would then live as long as the replicas do.
        async def prove(replica: Replica, exchange: Exchange) -> None:
            try:
                await handshake.run(replica, exchange)
            except Rejected as error:
                raise with_remedy(error, names) from error

        replicas = Replicas(
            urls,
            prove,
            headers={"authorization": f"Bearer {key}"} if key else {},
            concurrency=settings["concurrency"],
            request_seconds=settings["request_seconds"],
            total_seconds=settings["total_seconds"],
        )
        try:
            await replicas.start(start_seconds)
        except BaseException:
            await replicas.close()
            raise
        return replicas

    async def _score(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if len(response):
                groups[tuple(_ints(prompt))].append(i)
        results = [np.zeros(0, np.float32) for _ in responses]

        async def one(prompt: tuple[int, ...], i: int) -> None:
            results[i] = await self._ask(prompt, _ints(responses[i]), i)

        shares = any(r.trusted and r.dialect.SHARES_PROMPTS for r in self._replicas.replicas)

        async def group(prompt: tuple[int, ...], members: list[int]) -> None:
            if shares and len(members) > 1:  # the first leaves the prompt in the server's cache
                await one(prompt, members[0])
                members = members[1:]
            async with asyncio.TaskGroup() as tasks:
                for i in members:
                    tasks.create_task(one(prompt, i))

        try:
            async with asyncio.TaskGroup() as tasks:
                for prompt, members in groups.items():
                    tasks.create_task(group(prompt, members))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return results

    async def _ask(self, prompt: tuple[int, ...], response: list[int], i: int) -> np.ndarray:
        def request(replica: Replica) -> tuple[str, Any]:
            return replica.dialect.request(self._handshake.model, prompt, response)

        def plain(replica: Replica) -> tuple[str, Any]:
            return self.dialect.request(self._handshake.model, prompt, response)

        try:
            replica, reply = await self._replicas.post(request, key=prompt)
            try:
                return replica.dialect.logprobs(reply, prompt, response)
            except NotScored:
                _, reply = await self._replicas.post(plain, key=prompt)
                return self.dialect.logprobs(reply, prompt, response)
        except Rejected as error:
            error_with_remedy = with_remedy(error, self.dialect.KEY_VARIABLES)
            raise VerifierError(f"{self.name}, response {i}: {error_with_remedy}") from error
        except VerifierError as error:
            raise VerifierError(f"{self.name}, response {i}: {error}") from error

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, _event_loop())
        try:
            return future.result()
        except BaseException:  # an interrupt here must end the work there
            future.cancel()
            raise


_loop: asyncio.AbstractEventLoop | None = None
_starting = threading.Lock()
_left_behind: list[Any] = []
"""Of the process from which this one has forked off. To free it would close what both share."""


def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, so that callers may have one of theirs or none."""
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            args = (_loop,)
            threading.Thread(target=_run, args=args, name="cme-reward-http", daemon=True).start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while not loop.is_closed():
        # These leave the loop, where everything else becomes the result of its task.
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def _leave_behind() -> None:
    global _loop, _starting
    _left_behind.append(_loop)
    _loop, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(after_in_child=_leave_behind)


def _close_soon(replicas: Replicas) -> None:
    """For a finalizer, which may run in the loop's own thread and must not wait for it."""
    asyncio.run_coroutine_threadsafe(replicas.close(), _event_loop())


def _ints(ids: TokenIds) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _restore(positional: tuple[Any, ...], keywords: dict[str, Any]) -> EndpointVerifier:
    return EndpointVerifier(*positional, **keywords)
