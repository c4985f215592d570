"""Prompts that have been read: shared by the responses of a call, and kept for those of later ones.

Rollouts that finish one by one cost what a batch of them does, but for the prompts that memory has
no room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cme_reward._lru import LRU
from cme_reward.verifiers.frozen import FrozenModel

# Below this saving in tokens, batching across prompts beats running a prompt on its own.
WORTH_SHARING = 1.1
PROMPTS_KEPT = 4096


class Prefixes:
    """The caches of prompts of a frozen model, for one call at a time.

    Args:
        model: reads them.
        batch_tokens: of a pass.
        budget: most bytes kept between calls, of the prompts used last; 0 keeps none.
    """

    def __init__(self, model: FrozenModel, batch_tokens: int, budget: int) -> None:
        self._model = model
        self._batch_tokens = batch_tokens
        self._keeps = budget > 0
        self._kept: LRU[Any] = LRU(PROMPTS_KEPT, budget)

    def of(self, prompt: np.ndarray, responses: Sequence[int], *, only: bool) -> Any:
        """The cache of all but the prompt's last token, which predicts the response's first; None
        where the prompt is better read together with its responses.

        Args:
            prompt: ids `[P]`.
            responses: their lengths.
            only: whether the call has no other prompt.
        """
        if not self._model.shares or len(prompt) < 2:
            return None
        key = self._weights(), prompt.tobytes()
        if key not in self._kept and not self._pays(len(prompt), responses, only):
            return None
        return self._kept.get(key, lambda: self._model.prefix(prompt[:-1]), size_of)

    def _pays(self, size: int, responses: Sequence[int], only: bool) -> bool:
        """Whether G(P+R) / (P+GR), tokens without over tokens with a shared prompt, is enough.

        A prompt that shares its pass with no other one is read by itself for the sake of the next
        response already.
        """
        count, total = len(responses), sum(responses)
        if self._keeps and (only or 2 * (size + total) > self._batch_tokens):
            count, total = count + 1, total + max(responses)
        return size * count + total >= WORTH_SHARING * (size + total)

    def _weights(self) -> int:
        """Differs after a change of the weights by anything that torch keeps count of."""
        weights = self._model.model.parameters()
        return sum(weight._version for weight in weights if not weight.is_inference())


def size_of(cache: Any) -> int:
    """Bytes of all tensors in a cache of whatever class."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in _tensors(cache, set())}.values())  # fmt: skip


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dict__"):
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part, seen)
