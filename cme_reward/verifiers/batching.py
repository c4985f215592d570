"""One verifier for many callers at a time: what waits together is scored together."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cme_reward._forks import renew_after_fork
from cme_reward.errors import ConfigError, VerifierError
from cme_reward.verifiers.base import Closes, TokenIds, Verifier, close

Answer = list[np.ndarray]


@dataclass(eq=False)
class _Call:
    prompts: list[TokenIds]
    responses: list[TokenIds]
    prompt_sizes: dict[bytes, int]
    """Tokens of each different prompt."""
    answer: Future[Answer] | asyncio.Future[Answer]
    """For whom it is: a thread, or a coroutine of some event loop."""

    def begins(self) -> bool:
        """False if nobody waits for it any more."""
        if isinstance(self.answer, Future):
            return self.answer.set_running_or_notify_cancel()
        return not self.answer.cancelled()


class BatchingVerifier(Closes):
    """Merges the calls of threads and coroutines that wait for one verifier.

    A call starts when the verifier is free. What comes in meanwhile waits, and goes into the next
    call together: the oldest first, then those that share a prompt with it, then the others in
    their order, up to `max_batch_tokens`. Results are those of separate calls. When a merged call
    fails, its parts are tried one by one, so that only those at fault fail. What would end a thread
    or cancel a task, such as `SystemExit`, is a VerifierError to who asked. In a process that forks
    off, calls that others wait for are left to the first process.

    For verifiers that serve one call at a time, such as `hf:`; servers behind `vllm:` and
    `sglang:` do this themselves.

    Args:
        verifier: the verifier to share; closed together with this.
        max_batch_tokens: most tokens in one call, shared prompts counted once; a single call may
            exceed it. More keeps the verifier busier, fewer lets newcomers wait less.
        linger_seconds: longest that a free verifier waits for as many calls as there were when its
            last call ended, and never longer than that one took: most callers come back with their
            next rollout, and rollouts of a prompt are cheaper together. For verifiers that compute
            on the cores which prepare those calls; others would idle meanwhile. Who is alone never
            waits.
    """

    def __init__(
        self, verifier: Verifier, *, max_batch_tokens: int = 65_536, linger_seconds: float = 0.0
    ) -> None:
        if max_batch_tokens < 1:
            raise ConfigError(f"{max_batch_tokens=} must be at least 1")
        check_linger(linger_seconds)
        self.verifier = verifier
        self.max_batch_tokens = max_batch_tokens
        self.linger_seconds = linger_seconds
        self.name = verifier.name
        self.tokenizer = verifier.tokenizer
        self.max_length = verifier.max_length
        self.vocab_size = verifier.vocab_size
        self._closed = False
        self._start_afresh()
        renew_after_fork(self, BatchingVerifier._start_afresh)

    def _start_afresh(self) -> None:
        self._waiting: list[_Call] = []
        self._lock = threading.Lock()
        self._company = threading.Condition(self._lock)
        self._serving = False
        self._expected = 0
        self._last_seconds = 0.0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cme-reward-verifier")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.verifier, self.max_batch_tokens, self.linger_seconds)

    @property
    def waiting(self) -> int:
        """How many calls have not started yet."""
        return len(self._waiting)

    def logprobs(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> Answer:
        """See `Verifier.logprobs`; returns when the call that this became a part of ends."""
        answer: Future[Answer] = Future()
        self._submit(prompts, responses, answer)
        return answer.result()

    async def logprobs_async(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> Answer:
        """`logprobs` without blocking the event loop. Cancelled before its start, it never runs."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call = self._submit(prompts, responses, answer)
        try:
            return await answer
        except asyncio.CancelledError:
            self._forget(call)
            raise

    def close(self) -> None:
        """Fail what still waits, let the call in progress end, close the verifier."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        closed = VerifierError(f"{self.name} was closed")
        _deliver([(call, closed) for call in waiting if call.begins()])
        self._worker.shutdown()
        close(self.verifier)

    def _submit(
        self,
        prompts: Sequence[TokenIds],
        responses: Sequence[TokenIds],
        answer: Future[Answer] | asyncio.Future[Answer],
    ) -> _Call:
        if len(prompts) != len(responses):  # would shift the answers of others
            raise VerifierError(f"{len(prompts)} prompts for {len(responses)} responses")
        sizes = {np.asarray(p, dtype=np.int64).tobytes(): len(p) for p in prompts}
        call = _Call(list(prompts), list(responses), sizes, answer)
        with self._lock:
            if self._closed:
                raise VerifierError(f"{self.name} was closed")
            if not self._serving:
                try:
                    self._worker.submit(self._serve)
                except RuntimeError as error:  # the interpreter ends, or has too many threads
                    raise VerifierError(f"{self.name} takes no call: {error}") from error
                self._serving = True
            self._waiting.append(call)
            if len(self._waiting) >= self._expected:
                self._company.notify()
        return call

    def _forget(self, call: _Call) -> None:
        """Callers that come and go during a long call must not fill the memory."""
        with self._lock:
            self._waiting = [other for other in self._waiting if other is not call]

    def _serve(self) -> None:
        """One merged call after the other, until nothing waits."""
        calls: list[_Call] = []
        try:
            while calls := self._taken():
                _deliver(self._outcomes([call for call in calls if call.begins()]))
        except BaseException as error:  # of the thread itself: nobody is to wait for it
            with self._lock:
                calls += self._waiting
                self._waiting, self._serving = [], False
            _deliver([(call, _told(self.name, error)) for call in calls])

    def _taken(self) -> list[_Call]:
        """The next calls, taken out of those that wait; none ends the service."""
        with self._lock:
            self._company.wait_for(
                lambda: not 0 < len(self._waiting) < self._expected,
                min(self.linger_seconds, self._last_seconds),
            )
            calls = _chosen(self._waiting, self.max_batch_tokens)
            taken = set(calls)
            self._waiting = [call for call in self._waiting if call not in taken]
            self._serving = bool(calls)
        return calls

    def _outcomes(self, calls: list[_Call]) -> list[tuple[_Call, Answer | Exception]]:
        if len(calls) > 1:
            with suppress(BaseException):  # whose fault it was shows below
                answers = iter(self._ask(calls))
                return [(call, [next(answers) for _ in call.responses]) for call in calls]
        outcomes: list[tuple[_Call, Answer | Exception]] = []
        for call in calls:
            try:
                outcomes.append((call, self._ask([call])))
            except BaseException as error:
                outcomes.append((call, _told(self.name, error)))
        return outcomes

    def _ask(self, calls: Sequence[_Call]) -> Answer:
        prompts = [prompt for call in calls for prompt in call.prompts]
        responses = [response for call in calls for response in call.responses]
        left = len(self._waiting)  # beyond the budget: the next call starts at once
        started = time.perf_counter()
        answers = self.verifier.logprobs(prompts, responses)
        self._last_seconds = time.perf_counter() - started
        self._expected = 0 if left else len(calls) + len(self._waiting)
        if len(answers) != len(responses):
            raise VerifierError(
                f"{self.name} answered {len(answers)} of {len(responses)} responses"
            )
        return answers


def _chosen(waiting: list[_Call], budget: int) -> list[_Call]:
    """The oldest call, those that share a prompt with it, and others, within the budget."""
    if not waiting:
        return []
    oldest = waiting[0].prompt_sizes.keys()
    in_order = sorted(waiting, key=lambda call: oldest.isdisjoint(call.prompt_sizes))
    chosen: list[_Call] = []
    prompts: set[bytes] = set()
    for call in in_order:
        new = sum(n for key, n in call.prompt_sizes.items() if key not in prompts)
        size = new + sum(map(len, call.responses))
        if chosen and size > budget:
            continue
        chosen.append(call)
        prompts |= call.prompt_sizes.keys()
        budget -= size
    return chosen


def _told(name: str, error: BaseException) -> Exception:
    """An error as a waiter can be given it; some mean another thing where they are raised again."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    told = VerifierError(f"{name}: the call ended in {error!r}, which no verifier should raise")
    told.__cause__ = error
    return told


def _deliver(outcomes: Sequence[tuple[_Call, Answer | Exception]]) -> None:
    """To threads at once, to the coroutines of an event loop all in one turn of it."""
    loops = defaultdict(list)
    for call, outcome in outcomes:
        if isinstance(call.answer, Future):
            _settle(call.answer, outcome)
        else:
            loops[call.answer.get_loop()].append((call.answer, outcome))
    for loop, settled in loops.items():
        with suppress(RuntimeError):  # closed, with nobody left in it
            loop.call_soon_threadsafe(lambda all_: [_settle(*each) for each in all_], settled)


def _settle(answer: Future[Answer] | asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    if answer.done():  # cancelled, or told before
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def check_linger(seconds: float) -> None:
    """Raises ConfigError for what is no time to wait."""
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"linger_seconds={seconds}: expected a number of seconds, 0 or more")


def _restore(verifier: Verifier, max_batch_tokens: int, linger: float) -> BatchingVerifier:
    return BatchingVerifier(verifier, max_batch_tokens=max_batch_tokens, linger_seconds=linger)
