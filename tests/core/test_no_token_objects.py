"""Python does the same work for long responses as for short ones: arrays do what is per token."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from stubs import logprob_of
from tokenizer_kinds import load_tokenizer

from cme_reward import CrossModelEntropy


class ArrayVerifier:
    """Answers with arrays and keeps nothing."""

    name = "arrays"
    max_length = 10**7

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
        return [logprob_of(np.asarray(response)) for response in responses]


def batch(tokenizer: Any, sentences: int) -> tuple[list[str], list[np.ndarray]]:
    """Four responses with characters of one to four bytes."""
    texts = ["".join(f"Zoë’s {k} {i} 🙂 日本. " for i in range(sentences)) for k in range(4)]
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return ["Why?", "Why?", "How?", "How?"], ids


@pytest.mark.parametrize(
    ("generator", "verifier"), [("byte-level", "sentencepiece"), ("sentencepiece", "byte-level")]
)
def test_calls_and_objects_do_not_grow_with_length(generator: str, verifier: str) -> None:
    tokenizer = load_tokenizer(generator)
    cme = CrossModelEntropy(ArrayVerifier(load_tokenizer(verifier)), tokenizer)
    short, long = batch(tokenizer, 10), batch(tokenizer, 400)
    assert sum(map(len, long[1])) > 30 * sum(map(len, short[1])) > 1000
    cme(*short)  # renders the prompts
    assert _calls(cme, *long) <= 1.1 * _calls(cme, *short)
    assert _objects_kept(cme, *long) <= 1.1 * _objects_kept(cme, *short) + 50


def _calls(cme: CrossModelEntropy, prompts: list[str], ids: list[np.ndarray]) -> int:
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        cme(prompts, ids)
    finally:
        sys.setprofile(previous)
    return calls


def _objects_kept(cme: CrossModelEntropy, prompts: list[str], ids: list[np.ndarray]) -> int:
    tracemalloc.start()
    try:
        kept = cme(prompts, ids)
        snapshot = tracemalloc.take_snapshot()
        assert kept.mask.any()
    finally:
        tracemalloc.stop()
    return sum(trace.count for trace in snapshot.statistics("filename"))
