"""One verifier for many callers at a time, its calls observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np

from cme_reward.verifiers.base import Closes, TokenIds, Verifier, close
from cme_reward.verifiers.batching import BatchingVerifier
from cme_reward.verifiers.ensemble import Ensemble

Observe: TypeAlias = Callable[[int], AbstractContextManager[Any]]
"""Called with a call's number of responses; entered before it, left after it."""


def shared(
    verifier: Verifier | Ensemble,
    *,
    observe: Observe | None = None,
    max_batch_tokens: int = 65_536,
    linger_seconds: float = 0.0,
) -> Any:
    """The verifier, or the members of an ensemble, so that coroutines and threads can call it.

    One that has a `logprobs_async` of its own takes calls together by itself; others do behind a
    `BatchingVerifier`, whose arguments the last two are.
    """
    if isinstance(verifier, Ensemble):
        options: Any = {"max_batch_tokens": max_batch_tokens, "linger_seconds": linger_seconds}
        return Ensemble([shared(v, observe=observe, **options) for v in verifier.members])
    if hasattr(verifier, "logprobs_async"):
        return verifier if observe is None else _ObservedAsync(verifier, observe)
    watched = verifier if observe is None else _Observed(verifier, observe)
    return BatchingVerifier(
        watched, max_batch_tokens=max_batch_tokens, linger_seconds=linger_seconds
    )


class _Observed(Closes):
    def __init__(self, verifier: Any, observe: Observe) -> None:
        self.name: str = verifier.name
        self.tokenizer = verifier.tokenizer
        self.max_length: int = verifier.max_length
        self.vocab_size: int = verifier.vocab_size
        self._verifier = verifier
        self._observe = observe

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        with self._observe(len(responses)):
            return self._verifier.logprobs(prompts, responses)

    def close(self) -> None:
        close(self._verifier)


class _ObservedAsync(_Observed):
    async def logprobs_async(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        with self._observe(len(responses)):
            return await self._verifier.logprobs_async(prompts, responses)
