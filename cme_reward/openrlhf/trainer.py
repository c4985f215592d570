"""Per-token advantages in OpenRLHF's experience maker."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from cme_reward.advantages import group_advantages, token_advantages
from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError, InputError
from cme_reward.openrlhf.checks import KEY, argument, check_arguments
from cme_reward.openrlhf.score import add_to_response
from cme_reward.openrlhf.settings import load_settings


def patch(module: ModuleType) -> None:
    """Wrap `RemoteExperienceMaker` of OpenRLHF's module, once."""
    maker = module.RemoteExperienceMaker
    if getattr(maker, "_cme_reward", False):
        return
    maker.__init__ = _checked(maker.__init__)
    maker.compute_advantages_and_returns = _per_token(maker.compute_advantages_and_returns)
    maker._cme_reward = True


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """Refuse at start-up what would go wrong in the first step."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        check_arguments(self.strategy.args)
        self._cme_settings = load_settings()

    return __init__


def _per_token(original: Callable[..., Any]) -> Callable[..., Any]:
    """OpenRLHF's own advantages, replaced by per-token ones.

        A[i, t] = clip(group_advantages(r + p)[i, t]) + returns(-beta * KL)[i, t]

    r: token rewards in nats; p: what OpenRLHF's length penalties took from the response's reward,
    taken from each of its tokens (for `credit="return"`, once); clip: to `reward.clip_range`, where
    OpenRLHF clips its normalised reward; the last term as OpenRLHF adds it (0 for `kl.init_coef` 0
    or `kl.use_loss`). At
    `level="sequence"` r is one number per response. Position t counts from the first sampled token
    of a response; tokens of an environment in between count, and have no advantage.
    """

    @functools.wraps(original)
    @torch.no_grad()
    def compute_advantages_and_returns(
        self: Any, experiences: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        # Left in, the key would be taken for a metric.
        tokens = [_taken(experience) for experience in experiences]
        kls = [experience.kl for experience in experiences]
        before = [experience.rewards.double().clone() for experience in experiences]
        original(self, experiences, *args, **kwargs)
        penalties = [e.rewards.double() - b for e, b in zip(experiences, before, strict=True)]
        n = argument(self.strategy.args, "rollout.n_samples_per_prompt")
        groups = [i // n for i in itertools.chain.from_iterable(e.index for e in experiences)]
        advantages = _advantages(experiences, tokens, penalties, groups, self._cme_settings.config)
        limits = argument(self.strategy.args, "reward.clip_range")
        beta = max(float(self.kl_ctl.value), 0.0)
        for experience, own_BA, kl in zip(experiences, advantages, kls, strict=True):
            mask_BA = experience.action_mask.bool()
            if limits:
                own_BA = own_BA.clamp(*limits)
            own_BA = own_BA * mask_BA
            credited = (own_BA != 0).sum(dim=1) / mask_BA.sum(dim=1).clamp(min=1)
            experience.info["cme/credited"] = credited.float()
            kl_BA = self.get_cumulative_returns(-beta * kl.float(), mask_BA, 1.0)
            experience.advantages = own_BA.float() + kl_BA
            experience.returns = experience.advantages.clone()
        return experiences

    return compute_advantages_and_returns


def _taken(experience: Any) -> torch.Tensor:
    """The token rewards `[B, A]` of an experience, out of its info."""
    tokens_BA = experience.info.pop(KEY, None)
    shape = tuple(experience.action_mask.shape)
    if tokens_BA is None:
        raise ConfigError(
            "a batch came without token rewards, and would have been trained on one number per "
            f"response. Expected a list {KEY!r} in `extra_logs` of every rollout, as "
            "cme_reward.openrlhf.AgentExecutor returns it: does --train.agent_func_path name a "
            "file with that class, or one derived from it?"
        )
    if tuple(tokens_BA.shape) != shape:
        raise InputError(
            f"{KEY!r} has shape {tuple(tokens_BA.shape)} for actions of shape {shape}; expected "
            "one number for every token of prompt and response but the first, in every rollout"
        )
    if experience.rewards is None:
        raise InputError(
            "rollouts came with token rewards but no reward; expected `reward` next to `extra_logs`"
        )
    return tokens_BA


def _advantages(
    experiences: list[Any],
    tokens: list[torch.Tensor],
    penalties: list[torch.Tensor],
    groups: list[int],
    config: CMEConfig,
) -> list[torch.Tensor]:
    """For each experience `[B, A]` in float64, 0 outside the sampled tokens."""
    out = [torch.zeros(e.action_mask.shape, dtype=torch.float64) for e in experiences]
    if config.level == "sequence":
        rewards = torch.cat([e.rewards.double().reshape(-1) for e in experiences])
        ones = torch.ones(len(rewards), 1, dtype=torch.bool)
        shared = group_advantages(
            rewards[:, None], ones, groups, scale=config.scale, eps=config.eps
        )
        for own_BA, column in zip(out, shared.split([len(o) for o in out]), strict=True):
            own_BA += column
        return out
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    places: list[tuple[torch.Tensor, slice]] = []
    for own_BA, e, tokens_BA, penalty in zip(out, experiences, tokens, penalties, strict=True):
        for b, mask in enumerate(e.action_mask.bool()):
            sampled = mask.nonzero().flatten().tolist() or [0]
            span = slice(sampled[0], sampled[-1] + 1)
            scored = mask[span] & ~tokens_BA[b, span].isnan()
            rewards = tokens_BA[b, span].double()
            add_to_response(rewards, scored, penalty.reshape(-1)[b], config)
            rows.append((rewards, scored, mask[span]))
            places.append((own_BA[b], span))
    if not rows:
        return out
    rewards_BT, scored_BT, sampled_BT = (
        pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True)
    )
    advantages_BT = token_advantages(
        rewards_BT, scored_BT, sampled_BT, groups, **config.of_advantages
    )
    for (row, span), advantages in zip(places, advantages_BT, strict=True):
        row[span] = advantages[: span.stop - span.start]
    return out
