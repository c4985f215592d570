from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cme_reward import InputError, align_batch, align_logprobs, overlap_weights


@st.composite
def aligned_rows(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    def ends(total: int) -> list[int]:
        cuts = draw(st.lists(st.integers(0, total), max_size=12))
        return sorted([*cuts, total])

    total = draw(st.integers(0, 60))
    verifier_ends = ends(total)
    beyond = draw(st.sampled_from([0, 0, 7]))  # text past the verifier's context
    logp = st.floats(-30, 0)
    logprobs = draw(st.lists(logp, min_size=len(verifier_ends), max_size=len(verifier_ends)))
    return logprobs, verifier_ends, ends(total + beyond)


def test_the_papers_example() -> None:
    # "unhappiness": generator "un" (2 characters) + "happiness" (9), verifier "unhappi" (7) +
    # "ness" (4). "unhappi" falls 2/7 on "un" and 5/7 on "happiness", "ness" wholly on the latter.
    generator_ends, verifier_ends = [24, 132], [84, 132]
    rows, cols, weights = overlap_weights(generator_ends, verifier_ends)
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1)]
    assert weights.tolist() == [2 / 7, 5 / 7, 1.0]
    # logp = (-1.4, -0.3): "un" 2/7 * -1.4 = -0.4, "happiness" 5/7 * -1.4 - 0.3 = -1.3
    aligned = align_logprobs([-1.4, -0.3], verifier_ends, generator_ends)
    assert aligned == pytest.approx([-0.4, -1.3], abs=1e-15)


@given(aligned_rows())
def test_equals_the_double_loop_in_fractions(row: tuple[list[float], list[int], list[int]]) -> None:
    logprobs, verifier_ends, generator_ends = row
    expected = oracle.align([Fraction(x) for x in logprobs], verifier_ends, generator_ends)
    aligned = align_logprobs(logprobs, verifier_ends, generator_ends)
    assert aligned == pytest.approx([float(x) for x in expected], rel=1e-12, abs=1e-11)


@given(st.lists(aligned_rows(), max_size=6))
def test_a_batch_is_its_rows(batch: list[tuple[list[float], list[int], list[int]]]) -> None:
    together = align_batch(
        [row[0] for row in batch], [row[1] for row in batch], [row[2] for row in batch]
    )
    for aligned, row in zip(together, batch, strict=True):
        np.testing.assert_allclose(aligned, align_logprobs(*row), rtol=1e-12, atol=1e-11)


@given(aligned_rows())
def test_weights_are_those_of_the_alignment(row: tuple[list[float], list[int], list[int]]) -> None:
    logprobs, verifier_ends, generator_ends = row
    rows, cols, weights = overlap_weights(generator_ends, verifier_ends)
    dense = np.zeros((len(generator_ends), len(verifier_ends)))
    dense[rows, cols] = weights
    has_text = np.diff(verifier_ends, prepend=0) > 0
    np.testing.assert_allclose(dense.sum(0), has_text, rtol=1e-15)
    np.testing.assert_allclose(
        dense @ np.array(logprobs), align_logprobs(*row), rtol=1e-12, atol=1e-11
    )


def test_conserves_the_total_in_a_long_batch() -> None:
    rng = np.random.default_rng(0)
    logprobs, verifier_ends, generator_ends = [], [], []
    for scale in (1e-6, 1.0, 300.0):
        for size in (1, 100, 30_000):
            ends = np.cumsum(rng.integers(1, 100, size))
            cuts = np.unique(np.append(rng.integers(1, ends[-1] + 1, size), ends[-1]))
            logprobs.append(-scale * rng.exponential(size=size))
            verifier_ends.append(ends)
            generator_ends.append(cuts)
    for logp, aligned in zip(
        logprobs, align_batch(logprobs, verifier_ends, generator_ends), strict=True
    ):
        total = math.fsum(logp)
        assert abs(math.fsum(aligned) - total) <= 1e-9 * max(1, abs(total))


def test_same_tokenizer_is_the_identity() -> None:
    logprobs = [-0.5, -2.25, -0.125]
    assert align_logprobs(logprobs, [12, 24, 60], [12, 24, 60]).tolist() == logprobs


def test_tokens_without_text_neither_give_nor_get() -> None:
    # Generator: special token, "ab", special token. Verifier: "a", a token without text, "b".
    aligned = align_logprobs([-1.0, -7.0, -2.0], [12, 12, 24], [0, 24, 24])
    assert aligned.tolist() == [0, -3, 0]


def test_text_beyond_the_verifiers_context_gets_nothing() -> None:
    assert align_logprobs([-1.0], [12], [6, 12, 24]).tolist() == [-0.5, -0.5, 0]


def test_empty_input() -> None:
    assert align_batch([], [], []) == []
    aligned = align_batch([[], [-1.0], []], [[], [4], []], [[], [2, 4], [0]])
    assert [row.tolist() for row in aligned] == [[], [-0.5, -0.5], [0]]
    assert [part.size for part in overlap_weights([], [])] == [0, 0, 0]


@pytest.mark.parametrize(
    ("logprobs", "verifier_ends", "generator_ends", "message"),
    [
        ([-1.0], [6, 12], [12], "response 0 has 1 verifier log-probs and 2 verifier ends"),
        ([-1.0, -1.0], [12, 6], [12], "response 0: verifier ends fall at token 1"),
        ([-1.0], [12], [12, 6], "response 0: generator ends fall at token 1"),
        ([-1.0], [24], [12], "verifier tokens end at 24 and generator tokens at 12"),
        ([-1.0, math.nan], [6, 12], [12], "response 0, verifier token 1: log-prob nan"),
        ([-math.inf], [12], [12], "response 0, verifier token 0: log-prob -inf"),
        ([-1.0], [[12]], [12], "flat array of numbers"),
    ],
)
def test_refuses(logprobs: list, verifier_ends: list, generator_ends: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        align_logprobs(logprobs, verifier_ends, generator_ends)


def test_names_the_response_that_is_wrong() -> None:
    good = [-1.0], [12], [12]
    with pytest.raises(InputError, match="response 1, verifier token 0"):
        align_batch([good[0], [math.nan]], [good[1], [12]], [good[2], [12]])
    with pytest.raises(InputError, match="2 rows of log-probs, 1 of verifier ends"):
        align_batch([[-1.0], [-1.0]], [[12]], [[12], [12]])


def test_memory_is_linear() -> None:
    import tracemalloc

    ends = np.arange(1, 20_001)
    logprobs = -np.ones(20_000)
    tracemalloc.start()
    align_logprobs(logprobs, ends, ends)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * ends.nbytes  # a dense matrix would take 20,000 times as much
