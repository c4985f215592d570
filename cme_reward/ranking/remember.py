"""A verifier that reads each text once, however many settings of the reward ask about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward.verifiers.base import TokenIds, Verifier


class Remembering:
    """Answers again what it has been asked, and any beginning of it, until told to forget."""

    def __init__(self, verifier: Verifier) -> None:
        self.name, self.tokenizer = verifier.name, verifier.tokenizer
        self.max_length, self.vocab_size = verifier.max_length, verifier.vocab_size
        self.verifier = verifier
        self._known: dict[bytes, list[tuple[bytes, NDArray[Any]]]] = {}

    def logprobs(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> list[Any]:
        """Log-probs in nats of each response's tokens, see `Verifier.logprobs`."""
        keys = [(_bytes(p), _bytes(r)) for p, r in zip(prompts, responses, strict=True)]
        new = {key: k for k, key in enumerate(keys) if self._found(*key) is None}
        at = list(new.values())
        answers = (
            self.verifier.logprobs([prompts[k] for k in at], [responses[k] for k in at])
            if at
            else []
        )
        for (prompt, response), answer in zip(new, answers, strict=True):
            self._known.setdefault(prompt, []).append((response, np.asarray(answer)))
        return [self._found(*key) for key in keys]

    def forget(self) -> None:
        self._known.clear()

    def _found(self, prompt: bytes, response: bytes) -> NDArray[Any] | None:
        for known, logprobs in self._known.get(prompt, ()):
            if known.startswith(response):
                return logprobs[: len(response) // 8]
        return None


def _bytes(ids: TokenIds) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()
