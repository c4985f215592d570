"""Token rewards and their mask in one float32 tensor, the only one that veRL carries per token."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

_TINY = np.finfo(np.float32).tiny


def write_rewards(rewards: ArrayLike, mask: ArrayLike) -> NDArray[np.float32]:
    """Rewards that say themselves whether they count: +0.0 where masked, never where scored.

    A scored token can have reward 0 (the verifier is certain, or agrees with the sampler). It is
    written as -0.0, which adds, prints and compares like any zero; so is what float32 would round
    to it. `read_mask` tells the two apart by the sign bit.
    """
    values = np.asarray(rewards, dtype=np.float32)
    values = np.where(np.abs(values) < _TINY, np.float32(-0.0), values)
    return np.where(np.asarray(mask, dtype=bool), values, np.float32(0.0))


def read_mask(rewards: torch.Tensor) -> torch.Tensor:
    """True where a token was scored: everything but +0.0, which is also what padding has."""
    return (rewards != 0) | torch.signbit(rewards)
