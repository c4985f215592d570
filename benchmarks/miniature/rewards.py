"""From a condition to advantages, with the package's own rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.miniature.candidates import Candidate
from benchmarks.miniature.cast import CAPABILITIES, META_QUESTION, META_TEMPLATE, Cast
from benchmarks.miniature.conditions import Condition
from benchmarks.miniature.evaluate import text_of
from benchmarks.miniature.tasks import MAX_NEW, grade
from cme_reward import CMEConfig, group_advantages
from cme_reward.comparators import (
    MetaQuestion,
    call_reward,
    load_reward,
    needed_statistics,
    policy_statistics,
)
from cme_reward.verifiers.hf import TransformersVerifier

WHOLE: dict[str, Any] = {"answer": lambda text: text or None}
"""Answers are short enough to be compared as a whole."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ttrl": WHOLE,
    "evol-rl": WHOLE,
    "format-length": {"format": r"\S", "longest": MAX_NEW["long"]},
    "rlme": {"questions": [MetaQuestion(META_QUESTION)], "template": META_TEMPLATE},
}
PAPER: dict[str, Any] = {"whitespace": "mask"}
"""Of conditions that say nothing else."""
Rows = Sequence[Sequence[int]]
Advantages = Callable[[Sequence[str], Rows, Rows, Sequence[int]], torch.Tensor]


def verifier(cast: Cast, name: str, seed: int = 0) -> TransformersVerifier:
    return TransformersVerifier(cast.model(name, seed), cast.tokenizer(name), name=name)


def asked(condition: Condition, cast: Cast) -> Any:
    """The verifier of a condition, changed as its candidate says."""
    more = [verifier(cast, *model) for model in others(condition)]
    return condition.candidate.verifier(verifier(cast, condition.verifier), more)


def others(condition: Condition) -> list[tuple[str, int]]:
    """Names and seeds of the verifiers that a condition asks besides its own."""
    name, change = condition.verifier, condition.candidate
    if change.spread is not None:
        return [(name, 1), (name, 2)]
    if change.minus:
        return [(CAPABILITIES[CAPABILITIES.index(name) - 1], 0)]
    return []


def reward(condition: Condition, cast: Cast, policy: Any) -> Any:
    """The reward as `load_reward` makes it."""
    needs_verifier = condition.reward in ("cme", "rlme", "random")
    return load_reward(
        condition.reward,
        cast.tokenizer("pretrained"),
        CMEConfig(**{**PAPER, **condition.config}),
        verifier=asked(condition, cast) if needs_verifier else None,
        policy=policy,
        **OPTIONS.get(condition.reward, {}),
    )


def advantages(condition: Condition, cast: Cast, policy: Any) -> Advantages:
    """`(prompts, prompt_ids, response_ids, groups) -> advantages [B, T]` of a condition."""
    if condition.reward == "oracle":
        return partial(marked, cast.tokenizer(condition.regime))
    return given_by(reward(condition, cast, policy), condition.candidate, policy)


def marked(
    tokenizer: Any,
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    groups: Sequence[int],
) -> torch.Tensor:
    """GRPO's advantages `[B, T]` of the program's grades: what a learning rate is to allow."""
    texts = (text_of(tokenizer, ids) for ids in response_ids)
    marks = [grade(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return of_marks(marks, groups, max(map(len, response_ids)))


def of_marks(marks: Sequence[float], groups: Sequence[int], width: int) -> torch.Tensor:
    """GRPO's advantage of each response's mark, on all of its tokens: `[B, width]`."""
    marks_B1 = torch.tensor(marks, dtype=torch.float32)[:, None]
    return group_advantages(marks_B1, torch.ones_like(marks_B1), groups).expand(-1, width)


def given_by(
    scorer: Any,
    candidate: Candidate,
    policy: Any,
    as_rewarded: Callable[[Rows], Rows] = lambda ids: ids,
) -> Advantages:
    """`(prompts, prompt_ids, response_ids, groups) -> advantages [B, T]` of a reward.

    It is for the ids that `as_rewarded` makes of those that the policy sampled; what the policy
    says of its samples is of the latter.
    """

    def call(
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        groups: Sequence[int],
    ) -> torch.Tensor:
        statistics = None
        if needed_statistics(scorer):
            statistics = policy_statistics(policy, prompt_ids, response_ids)
        batch = call_reward(scorer, prompts, as_rewarded(response_ids), None, statistics)
        return candidate.advantages(batch, groups)

    return call
