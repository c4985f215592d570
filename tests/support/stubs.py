"""Verifiers whose log-probs are known beforehand, for tests of everything around them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizer_kinds import load_tokenizer
from waiting import PATIENCE

from cme_reward import VerifierError
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


class GatedVerifier(TableVerifier):
    """Holds calls until it is let go, and remembers them all."""

    def __init__(self) -> None:
        super().__init__(load_tokenizer("byte-level"))
        self.gate = threading.Event()
        self.busy = threading.Event()
        self.calls: list[list[list[int]]] = []

    def logprobs(
        self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
    ) -> list[np.ndarray]:
        self.calls.append([list(prompt) for prompt in prompts])
        self.busy.set()
        assert self.gate.wait(PATIENCE)
        if any(13 in prompt for prompt in prompts):
            raise VerifierError("does not like 13")
        return super().logprobs(prompts, responses)
