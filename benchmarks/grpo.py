"""GRPO in a page, with the package's own rewards and advantages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Ids = list[list[int]]


@dataclass(frozen=True)
class Settings:
    """The paper's shape (arXiv 2605.29009, Appendix E) at this size."""

    steps: int = 100
    prompts: int = 8
    rollouts: int = 8
    lr: float = 3e-4
    warmup: int = 20
    cosine: bool = True
    """Whether the learning rate falls to 0 along a cosine, as in the paper, or stays."""
    every: int = 20
    """Steps between two measurements."""
    kl: float = 0.0
    """Weight of the divergence from the policy as it was, 0 in the paper."""


class Environment(Protocol):
    """What is asked, how it is answered, and what the answers are worth to a judge."""

    def ask(self, n: int) -> list[str]:
        """The next n prompts."""
        ...

    def encode(self, prompts: Sequence[str]) -> Ids: ...

    def sample(self, policy: Any, prompt_ids: Ids, draws: torch.Generator) -> Ids:
        """A response to each prompt at temperature 1, its end included where it stopped."""
        ...

    def logprobs(self, policy: Any, prompt_ids: Ids, response_ids: Ids) -> list[torch.Tensor]:
        """`log p` of each response's tokens in nats, with gradients."""
        ...

    def measure(self, policy: Any) -> dict[str, Any]:
        """On prompts that are never asked."""
        ...


def train(
    policy: Any,
    environment: Environment,
    advantages: Callable[..., torch.Tensor],
    settings: Settings,
    seed: int,
    log: Callable[[dict[str, Any]], None] = lambda point: None,
) -> list[dict[str, Any]]:
    """Train the policy in place; returns a measurement at the start, then at every interval.

    On-policy with one update a batch, so that the clipped ratio of Eq. 2 is 1 and its gradient that
    of `A * log p`: mean over a response's tokens, then over responses.

    Args:
        policy: the generator.
        environment: what it is trained and measured on.
        advantages: `(prompts, prompt_ids, response_ids, groups) -> [B, T]`.
        settings: sizes and learning rate.
        seed: of sampling.
        log: receives each measurement.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    anchor = copy.deepcopy(policy).eval() if settings.kl else None
    curve: list[dict[str, Any]] = []

    def take_stock(step: int) -> None:
        policy.eval()
        curve.append(environment.measure(policy) | {"step": step})
        log(curve[-1])

    take_stock(0)
    for step in range(1, settings.steps + 1):
        asked = environment.ask(settings.prompts)
        prompts = [p for p in asked for _ in range(settings.rollouts)]
        prompt_ids = environment.encode(prompts)
        policy.eval()
        response_ids = environment.sample(policy, prompt_ids, draws)
        policy.train()
        own = environment.logprobs(policy, prompt_ids, response_ids)
        groups = [b // settings.rollouts for b in range(len(prompts))]
        advantages_BT = advantages(prompts, prompt_ids, response_ids, groups).to(own[0].device)
        per_response = [(advantages_BT[b, : len(row)] * row).mean() for b, row in enumerate(own)]
        loss = -torch.stack(per_response).mean()
        if anchor is not None:
            with torch.no_grad():
                before = environment.logprobs(anchor, prompt_ids, response_ids)
            far = [divergence(*rows).mean() for rows in zip(own, before, strict=True)]
            loss = loss + settings.kl * torch.stack(far).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _scale(step, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % settings.every == 0 or step == settings.steps:
            take_stock(step)
    return curve


def divergence(own_T: torch.Tensor, anchor_T: torch.Tensor) -> torch.Tensor:
    """GRPO's estimate of the divergence from the anchor at each sampled token, never negative:
    `q/p - log(q/p) - 1` (arXiv 2402.03300, Eq. 4)."""
    gap_T = anchor_T - own_T
    return gap_T.exp() - gap_T - 1


def _scale(step: int, settings: Settings) -> float:
    """Of the learning rate."""
    scale = min(1.0, step / settings.warmup)
    if settings.cosine:
        done = max(0.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
        scale *= 0.5 + 0.5 * math.cos(math.pi * done)
    return scale
