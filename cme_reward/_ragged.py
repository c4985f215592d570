"""Ragged batches as one flat array and row offsets, so that work is vectorised over all rows.

From rows as callers hand them over, and back into padded tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward.errors import InputError

Int64 = NDArray[np.int64]

PADDING = -1
"""Stands for what is no id of the vocabulary and was not sampled, such as -100."""


def row_offsets(lengths: Sequence[int] | Int64) -> Int64:
    """`[n0, n1, ...] -> [0, n0, n0 + n1, ...]`: row b is `flat[offsets[b]:offsets[b + 1]]`."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.add.accumulate(lengths, dtype=np.int64, out=offsets[1:])  # np.cumsum, with less ado
    return offsets


def flatten(rows: Sequence[Any], dtype: Any) -> tuple[NDArray[Any], Int64]:
    """Concatenate rows (lists, arrays or CPU tensors) into `(flat, offsets)`."""
    offsets = row_offsets([len(row) for row in rows])
    if not len(rows):
        return np.zeros(0, dtype=dtype), offsets
    if dtype == np.int64 and all(type(row) is list for row in rows):
        flat = _integers(rows)
    else:
        flat = np.concatenate([np.asarray(row) for row in rows]).astype(dtype, copy=False)
    return flat, offsets


def _integers(rows: Sequence[list[Any]]) -> Int64:
    """Lists of integers, one after the other; a TypeError for anything else.

    An array that grows is several times faster than one `np.array` per list, and one of unsigned
    32-bit numbers three times faster again; that one refuses what is no token id anyway.
    """
    for code in "Iq":
        numbers = array(code)
        try:
            for row in rows:
                numbers.fromlist(row)
        except OverflowError:
            continue
        return np.frombuffer(numbers, dtype=code).astype(np.int64, copy=False)
    raise OverflowError("an integer beyond 64 bits")


def split(flat: NDArray[Any], offsets: Int64) -> list[NDArray[Any]]:
    """The rows of a flat array, as views."""
    bounds = offsets.tolist()
    return [flat[i:j] for i, j in pairwise(bounds)]


def flatten_ids(rows: Sequence[Any], vocab_size: int, what: str) -> tuple[Int64, Int64]:
    """`flatten` for token ids, refusing anything that is not an id of the vocabulary.

    Raises `InputError` naming the first offending row, position and value.
    """
    flat, offsets = flatten_integers(rows, what)
    bad = out_of_vocabulary(flat, vocab_size)
    if bad.size:
        row, position = place_of(bad[0], offsets)
        raise InputError(
            f"{what} {row}, position {position}: id {int(flat[bad[0]])} is not in the vocabulary "
            f"(expected 0 <= id < {vocab_size}); were these ids sampled with another tokenizer, or "
            "is padding left in? Strip padding or pass response_masks"
        )
    return flat, offsets


def flatten_integers(rows: Sequence[Any], what: str) -> tuple[Int64, Int64]:
    """`flatten` for rows of integers, refusing anything else with an `InputError`."""
    for b, row in enumerate(rows):
        if type(row) is not list:
            values = np.asarray(row)
            if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
                raise InputError(
                    f"{what} {b} has shape {values.shape} and dtype {values.dtype}; "
                    "expected a flat sequence of integer token ids"
                )
    try:
        return flatten(rows, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{what}s must be flat sequences of integer token ids, got something else: {error}"
        ) from error


def out_of_vocabulary(flat: Int64, vocab_size: int) -> Int64:
    """Where there are no ids of the vocabulary."""
    if not flat.size or (flat.min() >= 0 and flat.max() < vocab_size):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero((flat < 0) | (flat >= vocab_size))


def place_of(at: int | np.int64, offsets: Int64) -> tuple[int, int]:
    """Row and position in it of an entry of a flat array."""
    row = int(np.searchsorted(offsets, at, side="right")) - 1
    return row, int(at - offsets[row])


def require_pairs(prompts: Sequence[Any], responses: Any) -> None:
    """Raise `InputError` unless there is one prompt for each response."""
    if isinstance(prompts, str) or len(prompts) != len(responses):
        raise InputError(
            f"got {len(prompts)} prompts and {len(responses)} responses; expected one prompt, a "
            "string or a list of messages, for each response"
        )


def on_host(rows: Any) -> Any:
    """Rows without tensors, wherever these lived; numpy knows no bfloat16."""
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().cpu()
        return rows.double().numpy() if rows.is_floating_point() else rows.numpy()
    return [on_host(row) if isinstance(row, torch.Tensor) else row for row in rows]


def flat_like(values: Any, offsets: Int64, name: str) -> NDArray[Any]:
    """Per-token values of the same ragged shape as the ids, flat."""
    rows = [np.asarray(row) for row in on_host(values)]
    if len(rows) != len(offsets) - 1:
        raise InputError(f"{name} has {len(rows)} rows for {len(offsets) - 1} responses")
    for b, row in enumerate(rows):
        expected = offsets[b + 1] - offsets[b]
        if row.shape != (expected,):
            raise InputError(
                f"{name} of response {b} has shape {row.shape}; expected one entry for each of "
                f"its {expected} tokens"
            )
    return np.concatenate([np.zeros(0), *rows])


def sums(flat: NDArray[Any], offsets: Int64) -> NDArray[np.float64]:
    """Sums of the rows of a flat array, `[B]`; 0 of an empty one."""
    sums_B = np.zeros(len(offsets) - 1)
    filled = np.flatnonzero(np.diff(offsets))  # reduceat takes an empty row for its neighbour
    if filled.size:
        sums_B[filled] = np.add.reduceat(flat, offsets[filled], dtype=np.float64)
    return sums_B


def pad(offsets: Int64, *flat: NDArray[Any]) -> list[torch.Tensor]:
    """Rows of flat arrays as tensors `[B, T]`, padded with 0 on the right."""
    if len(offsets) == 2:  # one response, as a server is asked of
        return [torch.from_numpy(values[None].copy()) for values in flat]
    lengths = np.diff(offsets)
    shape = len(lengths), int(lengths.max(initial=0))
    at = np.flatnonzero(np.arange(shape[1]) < lengths[:, None])
    padded = [np.zeros(shape, dtype=values.dtype) for values in flat]
    for rows, values in zip(padded, flat, strict=True):
        rows.ravel()[at] = values
    return [torch.from_numpy(rows) for rows in padded]
