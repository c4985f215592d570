"""Rows as callers hand them over -> flat arrays, and flat arrays -> padded tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward._ragged import Int64, flatten_integers, out_of_vocabulary, place_of
from cme_reward.errors import InputError
from cme_reward.spans.table import SpanTable


def on_host(rows: Any) -> Any:
    """Rows without tensors, wherever these lived; numpy knows no bfloat16."""
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().cpu()
        return rows.double().numpy() if rows.is_floating_point() else rows.numpy()
    return [on_host(row) if isinstance(row, torch.Tensor) else row for row in rows]


PADDING = -1
"""Stands for what is no id of the vocabulary and was not sampled, such as -100."""


def flat_responses(
    ids: Any, masks: Any, table: SpanTable, special: Int64, eos_ids: Int64
) -> tuple[Int64, Int64, NDArray[np.bool_]]:
    """Responses as callers give them -> their ids, row offsets, and which ids were sampled.

    Without a mask, of all responses or of one, everything was, but for the padding at its end.
    Under mask 0 any integer is allowed as padding: `PADDING` takes the place of those that are no
    ids. `special` are the ids that write no text, `eos_ids` those with which a response ends.

    Raises:
        InputError: for a sampled id that is not in the vocabulary, and for rows that are not of
            integers, or not of one length with their masks.
    """
    flat, offsets = flatten_integers(on_host(ids), "response")
    lengths = np.diff(offsets)
    sampled, given_B = np.ones(len(flat), dtype=bool), np.zeros(len(lengths), dtype=bool)
    if masks is not None:
        given_B = np.array([mask is not None for mask in masks], dtype=bool)
        if len(masks) == len(lengths) and not given_B.all():
            masks = [np.ones(n) if m is None else m for n, m in zip(lengths, masks, strict=True)]
        sampled = flat_like(masks, offsets, "response_masks").astype(bool)
    bad = out_of_vocabulary(flat, table.vocab_size)
    for at in bad[sampled[bad]][:1]:
        b, position = place_of(at, offsets)
        raise InputError(
            f"response {b}, position {position}: id {int(flat[at])} is not in the vocabulary "
            f"(expected 0 <= id < {table.vocab_size}); was it sampled with another tokenizer, or "
            "is padding left in? Strip padding, or give it mask 0 in response_masks"
        )
    if bad.size:
        flat = flat.copy()
        flat[bad] = PADDING
    if not given_B.all():
        pad_id = getattr(table.tokenizer, "pad_token_id", None)
        own = _without_padding(flat, offsets, special, eos_ids, pad_id)
        sampled &= own | np.repeat(given_B, lengths)
    return flat, offsets, sampled


def check_environment(flat: Int64, offsets: Int64, sampled: NDArray[np.bool_]) -> None:
    """Raise `InputError` for padding between sampled tokens, where an environment's words are."""
    for at in np.flatnonzero(flat == PADDING):
        b, position = place_of(at, offsets)
        row = sampled[offsets[b] : offsets[b + 1]]
        if row[:position].any() and row[position:].any():
            raise InputError(
                f"response {b}, position {position} has mask 0, is not in the vocabulary, and lies "
                "between sampled tokens: what an environment wrote there is shown to the verifier. "
                "Expected its ids; -100 and the like can stand before and after what was sampled"
            )


def _without_padding(
    flat: Int64, offsets: Int64, special: Int64, eos_ids: Int64, pad_id: int | None
) -> NDArray[np.bool_]:
    """All tokens but what follows the first end among the special tokens at a row's end.

    A row without an end was cut off; there, the tokenizer's padding tokens at its end are padding.
    """
    sampled = np.ones(len(flat), dtype=bool)
    textless, ends = np.isin(flat, special), set(eos_ids.tolist())
    for start, stop in pairwise(offsets.tolist()):
        if not textless[start:stop][-1:].any():
            continue
        n = int(np.append(textless[start:stop][::-1], False).argmin())
        tail = flat[stop - n : stop].tolist()
        kept = next((t + 1 for t, i in enumerate(tail) if i in ends), None)
        if kept is None:
            kept = n - next((t for t, i in enumerate(reversed(tail)) if i != pad_id), n)
        sampled[stop - n + kept : stop] = False
    return sampled


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


def pad(flat: NDArray[Any], offsets: Int64) -> torch.Tensor:
    """Rows of a flat array as a tensor `[B, T]`, padded with 0 on the right."""
    lengths = np.diff(offsets)
    padded = np.zeros((len(lengths), lengths.max(initial=0)), dtype=flat.dtype)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(padded)
