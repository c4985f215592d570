"""How a causal language model of transformers is run in parts: body, batches, budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def bodies(model: Any) -> Iterator[Any]:
    """What may be the part below the head; which name it has differs between models and versions
    of transformers. Whoever takes one has to show that it gives the model's own logits."""
    for find in ("base_model", "get_decoder", "model"):
        body = getattr(model, find, None)
        body = body() if find == "get_decoder" and body is not None else body
        if body is not None and body is not model:
            yield body


def logits_agree(
    got_TV: torch.Tensor, expected_TV: torch.Tensor, tolerance: float | None = None
) -> bool:
    """Equal but for rounding, relative to the largest; by the dtype, where nothing is given."""
    if tolerance is None:
        tolerance = max(1e-5, 4 * torch.finfo(expected_TV.dtype).eps)
    error = (got_TV.float() - expected_TV.float()).abs().max()
    return bool(error <= tolerance * expected_TV.float().abs().max())


def batch_tokens(device: torch.device) -> int:
    """Tokens of one pass, padding included, where nobody says otherwise."""
    return 512 if device.type == "cpu" else 16_384


def head_rows(device: torch.device, vocab_size: int, tensors: int = 1) -> int:
    """Positions whose logits exist at once, with so many tensors of their size: 128 MB on a CPU,
    512 MB elsewhere in all. Equal bytes, so that the peak does not depend on the vocabulary."""
    numbers = 2**25 if device.type == "cpu" else 2**27
    return max(1, numbers // (tensors * vocab_size))


def batches(widths: Mapping[int, int], budget: int) -> list[list[int]]:
    """Rows of like width together, widest first; rows x widest <= budget, or a single row."""
    found: list[list[int]] = []
    for i in sorted(widths, key=widths.__getitem__, reverse=True):
        if not found or (len(found[-1]) + 1) * widths[found[-1][0]] > budget:
            found.append([])
        found[-1].append(i)
    return found
