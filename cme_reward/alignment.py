"""Verifier log-probs -> generator tokens, by the share of each token's text.

A verifier token s spreads its log-prob over the generator tokens t that its text overlaps
(arXiv 2605.29009, Appendix B):

    w[t, s] = |span(v_s) ∩ span(y_t)| / |span(v_s)|,    aligned[t] = sum_s w[t, s] * logp[s]

Spans tile the text, so this is one piecewise-linear function read at the generator's ends: with
F(c) the cumulative log-prob at text position c, `aligned[t] = F(end_t) - F(end_{t-1})`. That takes
one cumulative sum and one interpolation for a whole batch, linear in its tokens, and the sum over
a response telescopes to the verifier's total.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cme_reward._ragged import Int64, row_offsets
from cme_reward.errors import InputError

Float64 = NDArray[np.float64]
Row = Sequence[float] | NDArray[Any]


def overlap_weights(
    generator_ends: ArrayLike, verifier_ends: ArrayLike
) -> tuple[Int64, Int64, Float64]:
    """The sparse weight matrix `w[t, s]` of one response, for looking and for tests.

    Args:
        generator_ends: `[T]` right end of each generator token, non-decreasing integers.
        verifier_ends: `[S]` the same for verifier tokens, of the same text.

    Returns:
        `(rows, cols, weights)`: `w[rows[k], cols[k]] = weights[k]`, every other entry is 0. At
        most `T + S - 1` entries. Each column of a verifier token with text sums to 1; tokens
        without text (zero width) have no entry. Empty input gives empty arrays.

    Raises:
        InputError: if ends fall, or the verifier's text is longer than the generator's.
    """
    ends_T = np.asarray(generator_ends, dtype=np.int64)
    ends_S = np.asarray(verifier_ends, dtype=np.int64)
    align_batch([np.zeros(len(ends_S))], [ends_S], [ends_T])  # the same checks
    cuts = np.union1d(ends_T, ends_S)
    cuts = cuts[(cuts > 0) & (cuts <= ends_S[-1:].sum())]
    rows = np.searchsorted(ends_T, cuts)
    cols = np.searchsorted(ends_S, cuts)
    return rows, cols, np.diff(cuts, prepend=0) / np.diff(ends_S, prepend=0)[cols]


def align_logprobs(
    verifier_logprobs: ArrayLike, verifier_ends: ArrayLike, generator_ends: ArrayLike
) -> Float64:
    """Aligned log-probs of one response, in nats, float64 `[T]`. See `align_batch`."""
    return align_batch(
        [np.asarray(verifier_logprobs)], [np.asarray(verifier_ends)], [np.asarray(generator_ends)]
    )[0]


def align_batch(
    verifier_logprobs: Sequence[Row],
    verifier_ends: Sequence[Row],
    generator_ends: Sequence[Row],
) -> list[Float64]:
    """Aligned log-probs of a ragged batch, in one pass over all its tokens.

    Args:
        verifier_logprobs: B rows `[S_b]`, log p of each verifier token, in nats.
        verifier_ends: B rows `[S_b]`, right end of each verifier token; non-decreasing integers
            in any unit (`SpanTable` counts twelfths of a character).
        generator_ends: B rows `[T_b]`, the same for generator tokens of the same texts.

    Returns:
        B float64 rows `[T_b]`; `sum(aligned[b]) == sum(verifier_logprobs[b])` over verifier tokens
        with text, to 1e-9 relative. Tokens without text (zero width) give and get nothing. Text
        beyond the last verifier token (a context that ran out) gets 0, which is not a log-prob:
        mask it. No rows give `[]`, a row without generator tokens an empty array.

    Raises:
        InputError: if the three disagree in length, ends decrease, a log-prob is not finite, or
            the verifier's text is longer than the generator's; names the response.
    """
    if not len(verifier_logprobs) == len(verifier_ends) == len(generator_ends):
        raise InputError(
            f"got {len(verifier_logprobs)} rows of log-probs, {len(verifier_ends)} of verifier "
            f"ends and {len(generator_ends)} of generator ends; expected one of each per response"
        )
    if not len(generator_ends):
        return []
    # A leading knot at 0 for each row: the text's start, where F is 0.
    logp_S, offsets_S = _with_knots(verifier_logprobs)
    ends_S, ends_offsets_S = _with_knots(verifier_ends)
    ends_T, offsets_T = _with_knots(generator_ends)
    if not np.array_equal(offsets_S, ends_offsets_S):
        b = int(np.flatnonzero(np.diff(offsets_S) != np.diff(ends_offsets_S))[0])
        raise InputError(
            f"response {b} has {len(verifier_logprobs[b])} verifier log-probs and "
            f"{len(verifier_ends[b])} verifier ends; expected as many"
        )
    _check_rows(logp_S, ends_S, offsets_S, ends_T, offsets_T)

    last_S, last_T = ends_S[offsets_S[1:] - 1], ends_T[offsets_T[1:] - 1]
    if (last_S < last_T).any():  # beyond the last verifier token F stays where it is
        ends_T = np.minimum(ends_T, np.repeat(last_S, np.diff(offsets_T)))

    # All rows on one axis, one unit apart so that neighbours share no position. Each row's first
    # knot takes the row before it back out of the running sum: it never grows beyond one
    # response's total, and neither does its rounding error.
    starts = np.zeros(len(offsets_T) - 1)
    np.cumsum(last_T[:-1] + 1, out=starts[1:])
    ends_S += np.repeat(starts, np.diff(offsets_S))
    ends_T += np.repeat(starts, np.diff(offsets_T))
    logp_S[1:][ends_S[1:] == ends_S[:-1]] = 0  # tokens without text
    logp_S[offsets_S[1:-1]] = -np.add.reduceat(logp_S, offsets_S[:-1])[:-1]
    cumulative = np.interp(ends_T, ends_S, np.cumsum(logp_S))
    aligned = np.diff(cumulative)
    bounds = offsets_T.tolist()
    return [aligned[i : j - 1] for i, j in pairwise(bounds)]


_KNOT = np.zeros(1)


def _with_knots(rows: Sequence[Row]) -> tuple[Float64, Int64]:
    """Rows with a 0 in front of each, flat (exact: ends are far below 2**53), and row offsets."""
    offsets = row_offsets([len(row) + 1 for row in rows])
    knotted = list(chain.from_iterable((_KNOT, row) for row in rows))
    try:
        return np.concatenate(knotted, dtype=np.float64, casting="unsafe"), offsets
    except (TypeError, ValueError) as error:
        raise InputError(
            f"every response needs a flat array of numbers, got something else: {error}"
        ) from error


def _check_rows(
    logp_S: Float64, ends_S: Float64, offsets_S: Int64, ends_T: Float64, offsets_T: Int64
) -> None:
    """Raise `InputError` at the first response whose numbers cannot be aligned."""
    for name, ends, offsets in (("verifier", ends_S, offsets_S), ("generator", ends_T, offsets_T)):
        falls = ends[1:] < ends[:-1]
        falls[offsets[1:-1] - 1] = False  # from one row's end to the next one's start
        if falls.any():
            b, t = _locate(falls, offsets)
            raise InputError(
                f"response {b}: {name} ends fall at token {t}; expected the right end of each "
                "token, from left to right"
            )
    longer = ends_S[offsets_S[1:] - 1] > ends_T[offsets_T[1:] - 1]
    if longer.any():
        b = int(np.flatnonzero(longer)[0])
        raise InputError(
            f"response {b}: verifier tokens end at {ends_S[offsets_S[b + 1] - 1]:.0f} and "
            f"generator tokens at {ends_T[offsets_T[b + 1] - 1]:.0f}; expected ends of one text"
        )
    if not np.isfinite(logp_S.sum()):
        b, s = _locate(~np.isfinite(logp_S[1:]), offsets_S)
        raise InputError(
            f"response {b}, verifier token {s}: log-prob {logp_S[offsets_S[b] + 1 + s]} is not "
            "finite; expected a log-prob in nats"
        )


def _locate(flags: NDArray[np.bool_], offsets: Int64) -> tuple[int, int]:
    """Row and token of the first flag; flag k is about flat entry k + 1, past its row's knot."""
    at = int(np.flatnonzero(flags)[0]) + 1
    b = int(np.searchsorted(offsets, at, side="right")) - 1
    return b, at - int(offsets[b]) - 1
