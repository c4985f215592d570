"""Metrics against what they are defined as, computed the long way."""

from __future__ import annotations

import numpy as np
import pytest

from cme_reward.metrics import repetitions


def counted(row: np.ndarray, n: int = 4) -> float:
    """Share of the n-grams that were there before, by a set of them."""
    grams = list(zip(*(row.tolist()[k:] for k in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / max(len(grams), 1)


@pytest.mark.parametrize(
    ("lengths", "vocabulary"),
    [
        ([], 1),
        ([0], 1),
        ([0, 3, 0, 4, 5, 0], 1),
        ([9, 0, 2, 70, 70], 2),
        (range(200), 3),
        ([400] * 700, 20),  # 280,000 tokens: there are no more slots for more
        ([300_000, 0, 5], 150_000),
    ],
)
def test_repetition_of_each_response(lengths: list[int], vocabulary: int) -> None:
    rng = np.random.default_rng(len(lengths))
    rows = [rng.integers(0, vocabulary, size=n) for n in lengths]
    assert repetitions(rows).tolist() == [counted(row) for row in rows]


def test_the_same_in_two_responses_is_no_repetition() -> None:
    row = np.arange(50)
    assert repetitions([row, row, np.append(row, row)]).tolist() == [0, 0, 47 / 97]
