"""GRPO in a page, with the package's own rewards and advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.miniature import evaluate, models
from benchmarks.miniature.sampling import sample
from benchmarks.miniature.tasks import Example, stream


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


def train(
    policy: Any,
    tokenizer: Any,
    advantages: Callable[..., torch.Tensor],
    settings: Settings,
    test: Sequence[Example],
    seed: int,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train the policy in place; returns a measurement at the start, then at every interval.

    On-policy with one update a batch, so that the clipped ratio of Eq. 2 is 1 and its gradient that
    of `A * log p`: mean over a response's tokens, then over responses.

    Args:
        policy: the generator.
        tokenizer: its tokenizer.
        advantages: `(prompts, prompt_ids, response_ids, groups) -> [B, T]`.
        settings: sizes and learning rate.
        test: held-out questions to measure on.
        seed: of prompts and sampling.
        log: receives a line at each measurement.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    examples = stream(10_000 + seed)
    curve: list[dict[str, Any]] = []

    def take_stock(step: int) -> None:
        point = evaluate.measure(policy, tokenizer, test) | {"step": step}
        curve.append(point)
        log(f"step {step}: accuracy {point['accuracy']:.2f}, length {point['length']:.1f}")

    take_stock(0)
    for step in range(1, settings.steps + 1):
        asked = [next(examples).prompt for _ in range(settings.prompts)]
        prompts = [p for p in asked for _ in range(settings.rollouts)]
        prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        policy.eval()
        response_ids = sample(policy, prompt_ids, draws)
        rows = [(p + r, len(p)) for p, r in zip(prompt_ids, response_ids, strict=True)]
        ids_BT, target_BT = models.collate(rows)
        policy.train()
        device = policy.device
        logp_BT = -models.token_losses(policy, ids_BT.to(device), target_BT.to(device))
        # Row b's response begins where its prompt ends.
        own = [
            logp_BT[b, len(p) - 1 : len(p) - 1 + len(r)]
            for b, (p, r) in enumerate(zip(prompt_ids, response_ids, strict=True))
        ]
        groups = [b // settings.rollouts for b in range(len(prompts))]
        advantages_BT = advantages(prompts, prompt_ids, response_ids, groups).to(device)
        per_response = [(advantages_BT[b, : len(row)] * row).mean() for b, row in enumerate(own)]
        loss = -torch.stack(per_response).mean()
        scale = min(1.0, step / settings.warmup)
        if settings.cosine:
            done = max(0.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
            scale *= 0.5 + 0.5 * math.cos(math.pi * done)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % settings.every == 0 or step == settings.steps:
            take_stock(step)
    return curve
