"""Rewards -> advantages, normalised per token position across the rollouts of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from cme_reward._keys import group_key
from cme_reward._settings import read_value
from cme_reward.errors import ConfigError, InputError

Scale = Literal["std", "batch", "none"]
Credit = Literal["token", "return", "sequence"]


def group_advantages(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    groups: Sequence[Any] | torch.Tensor,
    *,
    scale: Scale = "std",
    eps: float = 0.1,
) -> torch.Tensor:
    """Per-position group advantages (arXiv 2605.29009, section 2, after GRPO).

        A[i, t] = (r[i, t] - mean_t) / (std_t + eps)

    over the rollouts of the same prompt whose position t is unmasked, with the sample standard
    deviation; 0 where masked and where fewer than two rollouts are unmasked.

    Args:
        rewards: `[B, T]` token rewards in nats. Values under a False mask are not read.
        mask: `[B, T]`, True (or non-zero) where a token is scored.
        groups: B prompt identifiers in any order: numbers (of Python, numpy or in tensors), texts,
            the prompts themselves, or other hashables; groups may differ in size.
        scale: "std"; "batch" to divide by one number instead, the standard deviation of the
            numerators of all unmasked tokens, so that no position counts more for varying less;
            "none" to leave out the division (Dr. GRPO, arXiv 2503.20783).
        eps: added to the standard deviation, in nats. It matters: where rollouts agree, std_t goes
            to zero and a tiny eps turns rounding noise into advantages of size one. GRPO codes use
            1e-9 to 1e-4, the paper gives no value.

    Returns:
        `[B, T]` advantages with the dtype and device of `rewards`; in nats for "none", else without
        unit. An empty batch gives an empty tensor, a fully masked one zeros.

    Raises:
        InputError: if shapes or lengths disagree, an unmasked reward is not finite, or a group is
            nothing that can be compared.
        ConfigError: for an unknown `scale` or a negative `eps`.
    """
    read_value("scale", Scale, scale)
    if not eps >= 0:
        raise ConfigError(f"eps={eps!r} must be 0 or a positive number of nats")
    if rewards.ndim != 2 or mask.shape != rewards.shape or len(groups) != len(rewards):
        raise InputError(
            f"rewards {tuple(rewards.shape)}, mask {tuple(mask.shape)} and {len(groups)} groups do "
            "not fit together; expected [B, T], [B, T] and B"
        )
    mask_BT = mask.bool()
    # Deviations of nearly equal rewards need the digits; MPS has no float64.
    dtype = torch.float32 if rewards.device.type == "mps" else torch.float64
    rewards_BT = torch.where(mask_BT, rewards.to(dtype), 0)
    if not torch.isfinite(rewards_BT).all():
        b, t = (~torch.isfinite(rewards_BT)).nonzero()[0].tolist()
        raise InputError(
            f"rewards[{b}, {t}] is {rewards_BT[b, t].item()} and unmasked; expected a finite reward"
        )
    group_B = _group_index(groups).to(rewards.device)
    n_groups = int(group_B.max()) + 1 if len(rewards) else 0

    def group_sum(values_BT: torch.Tensor) -> torch.Tensor:
        """Sum over each row's group, given back to every row of it."""
        sums = values_BT.new_zeros(n_groups, rewards.shape[1]).index_add_(0, group_B, values_BT)
        return sums[group_B]

    count_BT = group_sum(mask_BT.to(dtype))
    mean_BT = group_sum(rewards_BT) / count_BT.clamp(min=1)
    compared_BT = mask_BT & (count_BT >= 2)
    deviation_BT = torch.where(compared_BT, rewards_BT - mean_BT, 0)
    if scale == "none":
        return deviation_BT.to(rewards.dtype)
    if scale == "batch":
        std_BT = (deviation_BT.square().sum() / (compared_BT.sum() - 1).clamp(min=1)).sqrt()
    else:
        std_BT = (group_sum(deviation_BT.square()) / (count_BT - 1).clamp(min=1)).sqrt()
    # With eps=0 and rollouts that agree, 0 / 0: an advantage of 0, as its limit from above.
    advantages_BT = torch.where(deviation_BT == 0, 0, deviation_BT / (std_BT + eps))
    return advantages_BT.to(rewards.dtype)


def token_advantages(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    sampled: torch.Tensor,
    groups: Sequence[Any] | torch.Tensor,
    *,
    credit: Credit = "token",
    gamma: float = 1.0,
    scale: Scale = "std",
    eps: float = 0.1,
) -> torch.Tensor:
    """`group_advantages` of token rewards, or of what each token leads to.

    Args:
        rewards: `[B, T]` token rewards in nats.
        mask: `[B, T]`, True where a token has a reward.
        sampled: `[B, T]`, True where the policy chose the token; False for padding and for what an
            environment wrote.
        groups: see `group_advantages`.
        credit: "token" for each token's own reward, "return" for `returns_to_go`.
        gamma: the discount of these.
        scale: see `group_advantages`.
        eps: see `group_advantages`.

    Returns:
        `[B, T]`, see `group_advantages`; 0 for tokens that were not sampled.
    """
    if credit == "return":
        rewards, mask = returns_to_go(rewards, mask, sampled, gamma)
    return group_advantages(rewards, mask, groups, scale=scale, eps=eps)


def returns_to_go(
    rewards: torch.Tensor, mask: torch.Tensor, sampled: torch.Tensor, gamma: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Discounted sums of a token's own and all later rewards, and which tokens have one.

        R[i, t] = r[i, t] + gamma R[i, next sampled t],    r = 0 where masked

    What an environment wrote earns nothing and passes the return on undiscounted. A sampled token
    without a reward (white space, a special token) has the return of what follows it. After a
    response's last reward nothing is known, of text beyond the verifier's context above all: those
    tokens have none.

    Args:
        rewards: `[B, T]` token rewards in nats.
        mask: `[B, T]`, True where a token has a reward.
        sampled: `[B, T]`, True where the policy chose the token.
        gamma: from 0, the rewards themselves, to 1, the sum of the response from here on.

    Returns:
        Returns `[B, T]` in nats, 0 where there is none, and their mask `[B, T]`.
    """
    mask_BT, sampled_BT = mask.bool(), sampled.bool()
    dtype = torch.float32 if rewards.device.type == "mps" else torch.float64
    own_BT = torch.where(mask_BT, rewards.to(dtype), 0)
    has_BT = mask_BT.flip(1).cummax(1).values.flip(1) & sampled_BT if mask.numel() else mask_BT
    if gamma == 1:
        returns_BT = own_BT.flip(1).cumsum(1).flip(1)
    else:
        returns_BT, later_B = torch.zeros_like(own_BT), own_BT.new_zeros(len(own_BT))
        for t in reversed(range(own_BT.shape[1])):
            later_B = torch.where(sampled_BT[:, t], own_BT[:, t] + gamma * later_B, later_B)
            returns_BT[:, t] = later_B
    return torch.where(has_BT, returns_BT, 0).to(rewards.dtype), has_BT


def _group_index(groups: Sequence[Any] | torch.Tensor) -> torch.Tensor:
    """Groups numbered from 0, `[B]`."""
    if isinstance(groups, torch.Tensor):
        if groups.ndim != 1:
            raise InputError(f"groups has shape {tuple(groups.shape)}; expected [B]")
        return torch.unique(groups, return_inverse=True)[1]
    numbers: dict[Any, int] = {}
    return torch.tensor(
        [numbers.setdefault(group_key(g), len(numbers)) for g in groups], dtype=torch.int64
    )
