"""Numbers that tell, in every training step, whether the reward is healthy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64, flatten

Float64 = NDArray[np.float64]


def repetition(ids: Sequence[Int64], n: int = 4) -> float:
    """Share of n-grams that already occurred earlier in the same response, mean over responses.

    0 for responses without a repeated n-gram, and for those shorter than n.
    """
    flat, offsets = flatten(ids, np.int64)
    lengths = np.diff(offsets)
    counts = np.maximum(lengths - n + 1, 0)
    if not counts.any():
        return 0.0
    rows = np.repeat(np.arange(len(ids)), counts)
    starts = np.arange(len(rows)) + np.repeat(offsets[:-1] - (np.cumsum(counts) - counts), counts)
    # n-grams as 64-bit polynomial hashes of row and ids; sorting numbers is far cheaper than sets.
    hashes = rows.astype(np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + flat[starts + k].astype(np.uint64)
        hashes ^= hashes >> np.uint64(29)
    order = np.argsort(hashes, kind="stable")
    repeated = np.zeros(len(rows), dtype=bool)
    repeated[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    shares = np.bincount(rows, repeated, len(ids)) / np.maximum(counts, 1)
    return float(shares.mean())


def length_correlation(sequence_rewards: Float64, lengths: Float64) -> float:
    """Pearson correlation of sequence reward and length; 0 where either does not vary."""
    if len(lengths) < 2 or not np.ptp(lengths) or not np.ptp(sequence_rewards):
        return 0.0
    return float(np.corrcoef(sequence_rewards, lengths)[0, 1])
