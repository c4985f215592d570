"""What the reward returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward.advantages import group_advantages
from cme_reward.config import CMEConfig


@dataclass(frozen=True)
class CMEBatch:
    """Rewards of B responses, padded on the right to T tokens: CPU tensors, in nats."""

    token_rewards: torch.Tensor
    """`[B, T]` float32, 0 where masked. At `level="sequence"`: the sequence reward on the last
    sampled token and 0 elsewhere, as frameworks place a scalar reward."""

    mask: torch.Tensor
    """`[B, T]` bool, True where a token has a reward. At `level="sequence"`: every sampled token,
    since they share one."""

    sequence_rewards: torch.Tensor
    """`[B]` float32: mean verifier log-prob per verifier token (arXiv 2605.29009, Eq. 3)."""

    token_logprobs: torch.Tensor
    """`[B, T]` float32: aligned verifier log-probs before masking; 0 for what the verifier did not
    see."""

    dropped_nats: torch.Tensor
    """`[B]` float32, >= 0: how much of a response's surprise lies on masked tokens."""

    verifier_tokens: list[tuple[NDArray[np.int64], NDArray[np.float64]]]
    """Per response, the verifier's ids and their log-probs, end of turn included; of the first
    member of an ensemble."""

    metrics: dict[str, float]
    """See `cme_reward.metrics`."""

    config: CMEConfig

    def advantages(self, groups: Sequence[Any] | torch.Tensor) -> torch.Tensor:
        """Advantages `[B, T]` at the configured level, scale and eps; 0 where masked.

        `level="token"`: `group_advantages` of the token rewards. `level="sequence"`: GRPO's scalar
        advantage of each response, on every sampled token.

        Args:
            groups: B prompt identifiers, or the prompts themselves, strings or message lists;
                rollouts of one prompt share one.
        """
        scale, eps = self.config.scale, self.config.eps
        if self.config.level == "token":
            return group_advantages(self.token_rewards, self.mask, groups, scale=scale, eps=eps)
        rewards_B1 = self.sequence_rewards[:, None]
        everyone = torch.ones_like(rewards_B1, dtype=torch.bool)
        return group_advantages(rewards_B1, everyone, groups, scale=scale, eps=eps) * self.mask
