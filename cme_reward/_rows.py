"""Rows as callers hand them over -> flat arrays, and flat arrays -> padded tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward._ragged import Int64
from cme_reward.errors import InputError


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


def pad(flat: NDArray[Any], offsets: Int64) -> torch.Tensor:
    """Rows of a flat array as a tensor `[B, T]`, padded with 0 on the right."""
    lengths = np.diff(offsets)
    padded = np.zeros((len(lengths), lengths.max(initial=0)), dtype=flat.dtype)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(padded)
