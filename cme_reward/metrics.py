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
    keys = np.sort(hashes[within_a_row])
    repeats = keys[1:][keys[1:] == keys[:-1]] >> (np.uint64(64) - row_bits)
    if not repeats.size:
        return 0.0
    counts = np.maximum(lengths - n + 1, 1)
    shares = np.bincount(repeats.astype(np.int64), minlength=len(ids)) / counts
    return float(shares.mean())


def length_correlation(sequence_rewards: Float64, lengths: Float64) -> float:
    """Pearson correlation of sequence reward and length; 0 where either does not vary."""
    if len(lengths) < 2 or not np.ptp(lengths) or not np.ptp(sequence_rewards):
        return 0.0
    return float(np.corrcoef(sequence_rewards, lengths)[0, 1])
