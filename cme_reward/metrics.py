"""All metrics of a batch: numbers that tell, in every training step, whether the reward is healthy.

`METRICS` defines them. Adapters log these names under their framework's prefix, and read from the
table how values of single responses make one of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64, flatten

Float64 = NDArray[np.float64]


class Metric(NamedTuple):
    unit: str
    over: Literal["tokens", "mean", "sum", "batch"]
    """How those of single responses make one: over all their rewarded tokens, their mean, their
    sum; or not at all, since it compares responses."""
    meaning: str
    worry: str = ""
    """When to worry; empty where it says nothing by itself."""


METRICS = {
    "token_reward_mean": Metric(
        "nats", "tokens", "mean reward of the tokens that have one", worry="well above 0"
    ),
    "token_reward_std": Metric(
        "nats", "tokens", "sample standard deviation of these rewards", worry="it goes to 0"
    ),
    "sequence_reward_mean": Metric(
        "nats", "batch", "mean sequence reward (Eq. 3)", worry="it rises while repetition rises"
    ),
    "coverage": Metric(
        "share",
        "mean",
        "of tokens with text other than white space, those all of whose text the verifier scored",
        worry="below 0.99",
    ),
    "dropped_nats": Metric(
        "nats",
        "mean",
        "a response's surprise that lies on masked tokens",
        worry="it is most of the surprise",
    ),
    "verifier_tokens_per_token": Metric(
        "tokens", "mean", "verifier tokens, end of turn included, per sampled token"
    ),
    "truncated": Metric(
        "responses", "sum", "responses that the verifier's context did not hold", worry="above 0"
    ),
    "repetition": Metric(
        "share",
        "mean",
        "of a response's 4-grams, those that it had before",
        worry="above the untrained policy's",
    ),
    "whitespace": Metric(
        "share",
        "mean",
        "of a response's tokens, those of white space only",
        worry="it rises under whitespace=mask",
    ),
    "length_correlation": Metric(
        "-1 to 1",
        "batch",
        "Pearson correlation of sequence reward and length; 0 without a spread",
        worry="it stays near 1 or -1",
    ),
    "special_masked": Metric(
        "tokens", "mean", "special tokens inside a response, left out", worry="above 0"
    ),
    "thinking_tokens": Metric(
        "tokens",
        "mean",
        "tokens of a response's thoughts, tags included",
        worry="it grows while the answer's reward does not",
    ),
    "thinking_unclosed": Metric(
        "share", "mean", "responses that end inside a thought", worry="it rises"
    ),
    "verifier_seconds": Metric("s", "sum", "in the verifier, or waiting for it"),
    "alignment_seconds": Metric("s", "sum", "in everything else"),
}


OF_TRAINERS = {
    "credited": Metric(
        "share",
        "tokens",
        "of the sampled tokens, those with an advantage other than 0",
        worry="it falls: rollouts agree, or few are as long",
    ),
    "scored": Metric(
        "share", "tokens", "of the sampled tokens, those with a reward", worry="it falls"
    ),
    "responses": Metric(
        "responses",
        "sum",
        "scored since the last step",
        worry="not batch times rollouts: some failed, see the log",
    ),
}
"""What adapters log beside these, of their own."""


def names(*over: str) -> tuple[str, ...]:
    """The metrics that are pooled in one of these ways, without those of time."""
    return tuple(k for k, metric in METRICS.items() if metric.over in over and metric.unit != "s")


def mean(values: NDArray, empty: float = 0.0) -> float:
    """Of numbers, if there are any."""
    return float(values.mean()) if values.size else empty


def spread(values: NDArray) -> float:
    """Sample standard deviation; 0 of fewer than two numbers."""
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def repetition(ids: Sequence[Int64], n: int = 4) -> float:
    """Share of n-grams that already occurred earlier in the same response, mean over responses.

    0 for responses without a repeated n-gram, and for those shorter than n.
    """
    return mean(repetitions(ids, n))


def repetitions(ids: Sequence[Int64], n: int = 4) -> Float64:
    """`repetition` of each response, `[B]`."""
    flat, offsets = flatten(ids, np.int64)
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(len(ids), dtype=np.uint64), lengths)
    n_windows = max(0, len(flat) - n + 1)
    # n-grams as 64-bit hashes of row and ids, the row in the leading bits: sorting
    # numbers is far cheaper than sets, and than argsort.
    hashes = rows[:n_windows]
    for k in range(n):
        hashes = (hashes + flat[k : n_windows + k].view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    row_bits = np.uint64(len(ids).bit_length())
    hashes >>= row_bits
    hashes |= rows[:n_windows] << (np.uint64(64) - row_bits)
    within_a_row = rows[:n_windows] == rows[n - 1 :]
    keys = np.sort(_sharing_a_slot(hashes[within_a_row]))
    repeats = keys[1:][keys[1:] == keys[:-1]] >> (np.uint64(64) - row_bits)
    counts = np.maximum(lengths - n + 1, 1)
    return np.bincount(repeats.astype(np.int64), minlength=len(ids)) / counts


def _sharing_a_slot(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Without most of those that occur once: this and sorting the rest take 0.6 of the time."""
    n_bits = min(16 * len(hashes) + 1, 1 << 22).bit_length() - 1  # 16 MiB at most
    slots = (hashes & np.uint64((1 << n_bits) - 1)).astype(np.int64)
    own = np.arange(len(hashes), dtype=np.int32)
    holder = np.empty(1 << n_bits, dtype=np.int32)
    holder[slots] = own  # one of those that share a slot stays
    holder = holder[slots]
    shared = holder != own
    shared[holder[shared]] = True
    return hashes[shared]


def length_correlation(sequence_rewards: Float64, lengths: Float64) -> float:
    """Pearson correlation of sequence reward and length; 0 where either does not vary."""
    if len(lengths) < 2 or not np.ptp(lengths) or not np.ptp(sequence_rewards):
        return 0.0
    return float(np.corrcoef(sequence_rewards, lengths)[0, 1])
