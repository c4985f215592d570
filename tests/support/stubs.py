"""A verifier whose log-probs are known beforehand, for tests of everything around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cme_reward.verifiers.base import TokenIds


class TableVerifier:
    """Gives id i the log-prob `-(1 + i % 7) / 4` and remembers what it was asked."""

    name = "table"

    def __init__(self, tokenizer: Any, max_length: int = 10_000) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocab_size = len(tokenizer)
        self.prompts: list[list[int]] = []
        self.responses: list[list[int]] = []

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        self.prompts = [list(prompt) for prompt in prompts]
        self.responses = [list(response) for response in responses]
        assert all(self.prompts)
        assert all(
            len(p) + len(r) <= self.max_length for p, r in zip(prompts, responses, strict=True)
        )
        return [logprob_of(np.array(response, dtype=np.int64)) for response in responses]


def logprob_of(ids: np.ndarray) -> np.ndarray:
    return (-(1 + ids % 7) / 4).astype(np.float32)
