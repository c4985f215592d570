"""Sampled ids to rewards, the verifier's forward pass left out, against the verifier's encode.

Nothing that scores text can be faster than encoding it, so the verifier tokenizer's own
`encode_batch_fast` on the same texts is the floor; what exceeds it is what the alignment costs.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cme_reward import CrossModelEntropy, SpanTable, align_batch, scoring
from cme_reward import reward as reward_module
from cme_reward.generator import Generator
from cme_reward.scoring import MemberScorer

PAIRS = ["llama -> qwen", "qwen -> gemma"]
UNICODE = [f"{pair}, unicode" for pair in PAIRS]


def ids_to_rewards(corpus: Any) -> list[np.ndarray]:
    """Decode with exact spans, encode for the verifier, align. Log-probs are given."""
    decoded = corpus.generator.decode_batch(corpus.generator_ids)
    encoded = corpus.verifier.encode_batch(decoded.texts)
    return align_batch(corpus.verifier_logprobs, encoded.ends, decoded.ends)


def encode_alone(corpus: Any) -> Any:
    backend = corpus.verifier.tokenizer.backend_tokenizer
    return backend.encode_batch_fast(corpus.texts, add_special_tokens=False)


def assert_conserved(aligned: Sequence[np.ndarray], logprobs: Sequence[np.ndarray]) -> None:
    for row, logp in zip(aligned, logprobs, strict=True):
        assert abs(row.sum() - logp.sum()) <= 1e-9 * max(1, abs(logp.sum()))


@pytest.mark.parametrize("threads", ["one thread", "all threads"])
@pytest.mark.parametrize("name", [*PAIRS, *UNICODE])
def test_ids_to_rewards(
    name: str,
    threads: str,
    corpora: dict[str, Any],
    paired: Any,
    ratio_table: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads are the tokenizers library's own; everything else runs on one."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", str(threads == "all threads").lower())
    corpus = corpora[name]
    assert_conserved(ids_to_rewards(corpus), corpus.verifier_logprobs)
    timing = paired(lambda: ids_to_rewards(corpus), lambda: encode_alone(corpus), rounds=15)
    _report(ratio_table, "ids -> aligned rewards", name, threads, timing)


class InstantVerifier:
    """Answers zeros at once, to time everything around a forward pass."""

    name = "instant"
    max_length = 1 << 20

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    def logprobs(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[np.ndarray]:
        return [np.zeros(len(row), dtype=np.float32) for row in responses]


def scorer(corpus: Any) -> tuple[CrossModelEntropy, list[str]]:
    """A reward whose verifier takes no time, and a prompt for every eight responses."""
    verifier = InstantVerifier(corpus.verifier.tokenizer)
    prompts = [f"Question {b // 8}: what do you make of it?" for b in range(len(corpus.texts))]
    return CrossModelEntropy(verifier, corpus.generator.tokenizer), prompts


@pytest.mark.parametrize("threads", ["one thread", "all threads"])
@pytest.mark.parametrize("name", PAIRS)
def test_whole_call(
    name: str,
    threads: str,
    corpora: dict[str, Any],
    paired: Any,
    ratio_table: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`CrossModelEntropy`: 8 rollouts a prompt, rendered prompts, masks, metrics and tensors."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", str(threads == "all threads").lower())
    corpus = corpora[name]
    reward, prompts = scorer(corpus)
    batch = reward(prompts, corpus.generator_ids)
    assert batch.mask.sum().item() > 0.5 * corpus.n_tokens
    assert batch.metrics["coverage"] == 1.0
    assert batch.token_rewards.abs().max().item() == 0.0
    timing = paired(
        lambda: reward(prompts, corpus.generator_ids), lambda: encode_alone(corpus), rounds=9
    )
    _report(ratio_table, "CrossModelEntropy call", name, threads, timing)


def _report(
    ratio_table: Callable[..., None], group: str, name: str, threads: str, timing: Any
) -> None:
    if timing:
        ratio_table(
            group,
            f"{name}, {threads}",
            f"{timing.ours * 1e3:.1f} ms",
            f"encode_batch_fast: {timing.baseline * 1e3:.1f} ms",
            f"{timing.ratio:.3f}",
        )


@pytest.mark.parametrize(
    ("what", "sizes"),
    [
        ("length, one response", [256 * 2**k for k in range(8)]),
        ("batch, 320 tokens each", [2**k for k in range(10)]),
    ],
)
def test_growth(
    what: str,
    sizes: list[int],
    corpora: dict[str, Any],
    growth: Any,
    ratio_table: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    corpus = corpora[PAIRS[0]]
    stream = [i for row in corpus.generator_ids for i in row]
    stream *= -(-sizes[-1] * (1 if "one response" in what else 320) // len(stream))

    def prepare(size: int) -> Callable[[], Any]:
        n_rows, length = (1, size) if "one response" in what else (size, 320)
        ids = [stream[b * length : (b + 1) * length] for b in range(n_rows)]
        decoded = corpus.generator.decode_batch(ids)
        logprobs = [-np.ones(len(row)) for row in corpus.verifier.encode_batch(decoded.texts).ids]

        def call() -> list[np.ndarray]:
            texts, ends, _ = corpus.generator.decode_batch(ids)
            return align_batch(logprobs, corpus.verifier.encode_batch(texts).ends, ends)

        assert_conserved(call(), logprobs)
        return call

    exponent, seconds = growth(prepare, sizes)
    if len(seconds) == len(sizes):
        ratio_table(
            "ids -> aligned rewards, growth",
            f"{what}: {sizes[0]} -> {sizes[-1]:,}",
            f"{seconds[0] * 1e3:.2f} -> {seconds[-1] * 1e3:.1f} ms",
            f"linear: x {sizes[-1] / sizes[0]:,.0f}",
            f"x {seconds[-1] / seconds[0]:,.1f}, exponent {exponent:.2f}",
        )


class Stopwatch:
    """Times of functions that call each other, each without those of the ones it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def watched(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                self.seconds[part] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return timed


PARTS = {
    "ids and masks checked": (CrossModelEntropy, "_checked"),
    "turns and thoughts found": (Generator, "segments"),
    "ids decoded": (SpanTable, "decode_batch"),
    "prompts rendered, or remembered": (MemberScorer, "_prompts"),
    "texts proved and placed": (SpanTable, "encode_batch"),
    "answers read": (MemberScorer, "read"),
    "aligned": (scoring, "align_batch"),
    "rewards, metrics, tensors": (reward_module, "assemble"),
    "everything else": (CrossModelEntropy, "__call__"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_where_a_call_goes(
    name: str,
    corpora: dict[str, Any],
    ratio_table: Any,
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part of `CrossModelEntropy`'s call without the parts it calls; all threads."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    corpus, watch = corpora[name], Stopwatch()
    reward, prompts = scorer(corpus)
    for part, (owner, attribute) in PARTS.items():
        monkeypatch.setattr(owner, attribute, watch.watched(part, getattr(owner, attribute)))
    backend = SimpleNamespace(
        encode_batch_fast=watch.watched(
            "the verifier's tokenizer", reward.members[0].table._backend.encode_batch_fast
        ),
        encode_batch=reward.members[0].table._backend.encode_batch,
    )
    monkeypatch.setattr(reward.members[0].table, "_backend", backend)
    rounds: list[dict[str, float]] = []

    def call() -> None:
        watch.seconds.clear()
        started = time.perf_counter()
        reward(prompts, corpus.generator_ids)
        whole = time.perf_counter() - started
        assert abs(sum(watch.seconds.values()) - whole) < 0.1 * whole
        assert watch.seconds.keys() == {*PARTS, "the verifier's tokenizer"}
        rounds.append(dict(watch.seconds))

    benchmark.pedantic(call, rounds=9, warmup_rounds=1)
    if benchmark.stats is None:
        return
    medians = {part: statistics.median(r[part] for r in rounds[1:]) for part in rounds[0]}
    whole = sum(medians.values())
    for part, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        ratio_table(
            f"where a call goes: {name}",
            part,
            f"{seconds * 1e3:.1f} ms",
            f"the call: {whole * 1e3:.1f} ms",
            f"{seconds / whole:.3f}",
        )
