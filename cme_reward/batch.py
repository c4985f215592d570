"""What the reward returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward.advantages import group_advantages, token_advantages
from cme_reward.config import CMEConfig

_SHOWN = ("sequence_reward_mean", "coverage", "dropped_nats", "truncated", "repetition")


@dataclass(frozen=True)
class CMEBatch:
    """Rewards of B responses, padded on the right to T tokens, in nats; on the CPU until `to`.

    No responses give tensors of no rows. A response without a token that has a reward has a row of
    zeros, its mask False throughout.
    """

    token_rewards: torch.Tensor
    """`[B, T]` float32, nats, 0 where masked. At `level="sequence"`: the sequence reward on the
    last sampled token and 0 elsewhere, as frameworks place a scalar reward."""

    mask: torch.Tensor
    """`[B, T]` bool, True where a token has a reward. At `level="sequence"`: every sampled token,
    since they share one."""

    sampled: torch.Tensor
    """`[B, T]` bool, True where the generator chose the token: neither padding, nor written by an
    environment."""

    sequence_rewards: torch.Tensor
    """`[B]` float32, nats per verifier token: mean verifier log-prob (arXiv 2605.29009, Eq. 3)."""

    token_logprobs: torch.Tensor
    """`[B, T]` float32, nats: aligned verifier log-probs before masking; 0 for what the verifier
    did not see."""

    dropped_nats: torch.Tensor
    """`[B]` float32, nats, >= 0: how much of a response's surprise lies on masked tokens."""

    verifier_tokens: list[tuple[NDArray[np.int64], NDArray[np.float64]]]
    """Per response, the verifier's ids `[S]` and their log-probs `[S]` in nats, end of turn
    included; of the first member of an ensemble."""

    metrics: dict[str, float]
    """Numbers of the whole batch, see `cme_reward.metrics.METRICS`."""

    config: CMEConfig
    """The settings it was made with."""

    def __repr__(self) -> str:
        responses, tokens = self.mask.shape
        shown = [f"{name}={self.metrics[name]:.4g}" for name in _SHOWN if name in self.metrics]
        return (
            f"CMEBatch({responses} responses, T={tokens}, level={self.config.level!r}, "
            f"rewarded={int(self.mask.sum())}, {', '.join(shown)})"
        )

    def to(self, device: torch.device | str | int) -> CMEBatch:
        """The same, its tensors on a device; the verifier's tokens are numpy arrays and stay."""
        names = [name for name, value in vars(self).items() if isinstance(value, torch.Tensor)]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def advantages(self, groups: Sequence[Any] | torch.Tensor) -> torch.Tensor:
        """Advantages `[B, T]` at the configured level, credit, scale and eps; 0 where masked.

        `level="token"`: `token_advantages`. `level="sequence"`: GRPO's scalar advantage of each
        response, on every sampled token.

        Args:
            groups: B prompt identifiers, or the prompts themselves, strings or message lists;
                rollouts of one prompt share one.
        """
        config = self.config
        if config.level == "token":
            return token_advantages(
                self.token_rewards, self.mask, self.sampled, groups, **config.of_advantages
            )
        rewards_B1 = self.sequence_rewards[:, None]
        everyone = torch.ones_like(rewards_B1, dtype=torch.bool)
        scalar_B1 = group_advantages(
            rewards_B1, everyone, groups, scale=config.scale, eps=config.eps
        )
        return scalar_B1 * self.mask
