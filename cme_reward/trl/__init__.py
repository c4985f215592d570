"""Cross-model entropy in TRL: a reward function, and a GRPO trainer that takes it per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cme_reward._lazy import lazy

if TYPE_CHECKING:
    from cme_reward.trl.reward import RewardFunction, cme_reward_func
    from cme_reward.trl.trainer import CMEGRPOTrainer

__all__ = ["CMEGRPOTrainer", "RewardFunction", "cme_reward_func"]

_HOMES = {"CMEGRPOTrainer": "trainer", "RewardFunction": "reward", "cme_reward_func": "reward"}
__getattr__ = lazy(__name__, _HOMES, needs=["trl"], extra="trl")
