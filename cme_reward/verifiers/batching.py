"""One verifier for many callers at a time: what waits together is scored together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cme_reward.errors import ConfigError, VerifierError
from cme_reward.verifiers.base import Closes, TokenIds, Verifier, close


@dataclass(eq=False)
class _Call:
    prompts: list[TokenIds]
    responses: list[TokenIds]
    prompt_sizes: dict[bytes, int]
    """Tokens of each different prompt."""
    answer: Future[list[np.ndarray]] = field(default_factory=Future)


class BatchingVerifier(Closes):
    """Merges the calls of threads and coroutines that wait for one verifier.

    A call starts at once when the verifier is free. What comes in meanwhile waits, and goes into
    the next call together: the oldest first, then those that share a prompt with it, then the
    others in their order, up to `max_batch_tokens`. Results are those of separate calls. When a
    merged call fails, its parts are tried one by one, so that only those at fault fail.

    For verifiers that serve one call at a time, such as `hf:`; servers behind `vllm:` and
    `sglang:` do this themselves.

    Args:
        verifier: the verifier to share; closed together with this.
        max_batch_tokens: most tokens in one call, shared prompts counted once; a single call may
            exceed it. More keeps the verifier busier, fewer lets newcomers wait less.
    """

    def __init__(self, verifier: Verifier, *, max_batch_tokens: int = 65_536) -> None:
        if max_batch_tokens < 1:
            raise ConfigError(f"{max_batch_tokens=} must be at least 1")
        self.verifier = verifier
        self.max_batch_tokens = max_batch_tokens
        self.name = verifier.name
        self.tokenizer = verifier.tokenizer
        self.max_length = verifier.max_length
        self.vocab_size = verifier.vocab_size
        self._waiting: list[_Call] = []
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cme-reward-verifier")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.verifier, self.max_batch_tokens)

    @property
    def waiting(self) -> int:
        """How many calls have not started yet."""
        return len(self._waiting)

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """See `Verifier.logprobs`; returns when the call that this became a part of ends."""
        return self._submit(prompts, responses).answer.result()

    async def logprobs_async(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        """`logprobs` without blocking the event loop. Cancelled before its start, it never runs."""
        call = self._submit(prompts, responses)
        try:
            return await asyncio.wrap_future(call.answer)
        except asyncio.CancelledError:
            self._forget(call)
            raise

    def close(self) -> None:
        """Fail what still waits, let the call in progress end, close the verifier."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for call in waiting:
            if call.answer.set_running_or_notify_cancel():
                call.answer.set_exception(VerifierError(f"{self.name} was closed"))
        self._worker.shutdown()
        close(self.verifier)

    def _submit(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> _Call:
        if len(prompts) != len(responses):  # would shift the answers of others
            raise VerifierError(f"{len(prompts)} prompts for {len(responses)} responses")
        sizes = {np.asarray(p, dtype=np.int64).tobytes(): len(p) for p in prompts}
        call = _Call(list(prompts), list(responses), sizes)
        with self._lock:
            self._waiting.append(call)
        try:
            self._worker.submit(self._serve)
        except RuntimeError as error:
            raise VerifierError(f"{self.name} was closed") from error
        return call

    def _forget(self, call: _Call) -> None:
        """Callers that come and go during a long call must not fill the memory."""
        with self._lock:
            self._waiting = [other for other in self._waiting if other is not call]

    def _serve(self) -> None:
        """Once for each call, which may have been served with an earlier one."""
        with self._lock:
            calls = _chosen(self._waiting, self.max_batch_tokens)
            taken = set(calls)
            self._waiting = [call for call in self._waiting if call not in taken]
        calls = [call for call in calls if call.answer.set_running_or_notify_cancel()]
        if len(calls) > 1:
            try:
                answers = iter(self._ask(calls))
            except Exception:
                pass  # whose fault it was shows below
            else:
                for call in calls:
                    call.answer.set_result([next(answers) for _ in call.responses])
                return
        for call in calls:
            try:
                call.answer.set_result(self._ask([call]))
            except BaseException as error:
                call.answer.set_exception(error)

    def _ask(self, calls: Sequence[_Call]) -> list[np.ndarray]:
        prompts = [prompt for call in calls for prompt in call.prompts]
        responses = [response for call in calls for response in call.responses]
        answers = self.verifier.logprobs(prompts, responses)
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


def _restore(verifier: Verifier, max_batch_tokens: int) -> BatchingVerifier:
    return BatchingVerifier(verifier, max_batch_tokens=max_batch_tokens)
