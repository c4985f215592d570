"""The advantage estimator `cme_grpo`: per-position group normalisation inside veRL."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est

from cme_reward.advantages import group_advantages, token_advantages
from cme_reward.errors import InputError
from cme_reward.verl.channel import read_mask
from cme_reward.verl.metrics import note
from cme_reward.verl.settings import EstimatorSettings, refuse_kl_in_reward


@register_adv_est("cme_grpo")
def cme_grpo(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any = None,
    config: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """veRL's estimator for cross-model entropy: `group_advantages` over the rollouts of a prompt.

    Options are read from `algorithm.cme`: those of `EstimatorSettings`, as in `CMEConfig`. At the
    sequence level all sampled tokens of a response share the advantage of its summed reward.

    Args:
        token_level_rewards: `[B, T]` in nats, as `CMEReward` writes them: +0.0 is masked.
        response_mask: `[B, T]`, 1 for sampled tokens.
        index: B prompt identifiers.
        config: veRL's `algorithm` section.

    Returns:
        Advantages and returns, the same tensor `[B, T]`; 0 where masked.

    Raises:
        VerifierError: if rewards are missing because the verifier failed; names the verifier.
        InputError: if no response has more than one rewarded token, which is what is left of token
            rewards after veRL made one number of them.
        ConfigError: for unknown options, or with `use_kl_in_reward`.
    """
    refuse_kl_in_reward(config)
    settings = EstimatorSettings.from_algorithm(config)
    sampled_BT = response_mask.bool()
    if torch.isnan(token_level_rewards).any():
        from cme_reward.verl.scorer import failure

        raise failure()
    if index is None:
        raise InputError("cme_grpo got no `index`; expected the uid of each response's prompt")
    if settings.level == "sequence":
        rewards_B1 = (token_level_rewards * sampled_BT).sum(dim=1, keepdim=True)
        anyone_B1 = sampled_BT.any(dim=1, keepdim=True)
        advantages = group_advantages(
            rewards_B1, anyone_B1, list(index), scale=settings.scale, eps=settings.eps
        )
        advantages_BT = advantages * sampled_BT
        return advantages_BT, advantages_BT
    scored_BT = read_mask(token_level_rewards) & sampled_BT
    _require_tokens(scored_BT, sampled_BT)
    advantages_BT = token_advantages(
        token_level_rewards,
        scored_BT,
        sampled_BT,
        list(index),
        credit=settings.credit,
        gamma=settings.gamma,
        scale=settings.scale,
        eps=settings.eps,
    )
    tokens = sampled_BT.sum().clamp(min=1)
    note(
        scored=float(scored_BT.sum() / tokens),
        credited=float((advantages_BT != 0).sum() / tokens),
    )
    return advantages_BT, advantages_BT


def _require_tokens(scored_BT: torch.Tensor, sampled_BT: torch.Tensor) -> None:
    longer_B = sampled_BT.sum(dim=1) >= 2
    if longer_B.any() and not (scored_BT[longer_B].sum(dim=1) >= 2).any():
        raise InputError(
            f"none of {int(longer_B.sum())} responses has a reward on more than one token: token "
            "rewards were made one number on their way, or another reward manager is in use. "
            "Expected reward.reward_manager.name=CMEReward and "
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class="
            "cme_reward.verl.CMEAgentLoopManager"
        )
