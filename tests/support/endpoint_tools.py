"""Batches for the verifiers behind HTTP, and what a stand-in for a server answers to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from fake_engines import FakeEngine, true_logprobs
from tokenizer_kinds import load_tokenizer

QUICK: dict[str, Any] = {"start_seconds": 10.0, "total_seconds": 60.0, "request_seconds": 30.0}


def fake(engine: str, tokenizer: str = "byte-level", **options: Any) -> FakeEngine:
    return FakeEngine(engine, load_tokenizer(tokenizer), **options)


def batch(n_groups: int, rollouts: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(300, size=rng.integers(1, 30)).tolist() for _ in range(n_groups)]
    responses = [
        rng.integers(300, size=n).tolist() for n in rng.integers(0, 40, n_groups * rollouts)
    ]
    return [p for p in prompts for _ in range(rollouts)], responses


def expected(prompts: list[list[int]], responses: list[list[int]], shift: float = 0) -> list[Any]:
    return [
        (true_logprobs(p + r)[len(p) - 1 :] - shift).astype(np.float32)
        for p, r in zip(prompts, responses, strict=True)
    ]


def assert_same(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(got) == len(wanted)
    for row, other in zip(got, wanted, strict=True):
        assert row.dtype == np.float32
        assert row.tolist() == other.tolist()
