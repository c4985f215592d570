"""What a policy is worth, with the program as the judge."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import mpmath  # comes with torch
import numpy as np
import torch

from benchmarks.miniature import long_tasks, models
from benchmarks.miniature.models import EOS
from benchmarks.miniature.sampling import sample
from benchmarks.miniature.tasks import HALVES, LONG, MAX_NEW, SHORT, Example, grade
from cme_reward.metrics import repetition


def answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], seed: int | None = None
) -> list[list[int]]:
    """Greedy responses as ids; with a seed, sampled ones."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=False)["input_ids"]
    half = "long" if any(e.task in HALVES["long"] for e in examples) else "short"
    return sample(model, prompts, generator, MAX_NEW[half])


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """A response as the judge reads it: without EOS, and marked where it never stopped."""
    if not ids or ids[-1] != EOS:
        return tokenizer.decode(ids) + "..."
    return tokenizer.decode(ids[:-1])


def grades(
    tokenizer: Any, examples: Sequence[Example], ids: Sequence[Sequence[int]]
) -> list[float]:
    """The judge's grade of each response; one that was cut off is wrong."""
    return [grade(e.prompt, text_of(tokenizer, i)) for e, i in zip(examples, ids, strict=True)]


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Tie-adjusted win rate, `(wins + ties / 2) / N`, over the same prompts.

    Raises:
        ValueError: if there are none, or not equally many.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} grades against {len(theirs)}; expected the same, above 0")
    pairs = list(zip(ours, theirs, strict=True))
    return (sum(a > b for a, b in pairs) + sum(a == b for a, b in pairs) / 2) / len(pairs)


def measure(model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Greedy accuracy, also by task and length, and the signs of collapse.

    `accuracy` is the share of grade 1, `sampled` the same at temperature 1. `length`, `stopped` and
    `repetition` (share of repeated 4-grams) are of the greedy responses; `entropy` is the mean of
    the policy's next-token entropy over them, in nats; `distinct` the share of different sentences
    among the free texts' parts after the topic.
    """
    model.eval()
    ids = answers(model, tokenizer, examples)
    found = grades(tokenizer, examples, ids)
    drawn = answers(model, tokenizer, examples, seed=0)
    by_task, by_length, tails = defaultdict(list), defaultdict(list), []
    for example, mark, row in zip(examples, found, ids, strict=True):
        by_task[example.task].append(mark == 1)
        given = example.prompt.rstrip("\n").partition(": ")[2]
        if example.task == "say":
            tails.append(text_of(tokenizer, row).removeprefix(f"the {given}"))
        elif example.task == long_tasks.TELL:
            topic = given.partition(" ")[2]
            tails += text_of(tokenizer, row).replace(f"the {topic}", "").split(". ")
        elif example.task not in ("add", *HALVES["long"]):
            by_length["short" if len(given) in SHORT else "long"].append(mark == 1)
            assert len(given) <= LONG[-1]
    return {
        "accuracy": statistics.mean(mark == 1 for mark in found),
        "grades": found,
        "sampled": statistics.mean(m == 1 for m in grades(tokenizer, examples, drawn)),
        **{task: statistics.mean(marks) for task, marks in by_task.items()},
        **{length: statistics.mean(marks) for length, marks in by_length.items()},
        "length": statistics.mean(map(len, ids)),
        "stopped": statistics.mean(row[-1] == EOS for row in ids),
        "repetition": repetition([np.array(row, dtype=np.int64) for row in ids]),
        "entropy": entropy(model, tokenizer, examples, ids),
        "distinct": len(set(tails)) / len(tails) if tails else 0.0,
    }


@torch.no_grad()
def entropy(
    model: Any, tokenizer: Any, examples: Sequence[Example], ids: Sequence[Sequence[int]]
) -> float:
    """Mean entropy in nats of the next-token distributions along the responses."""
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=False)["input_ids"]
    rows = [(p + list(i), len(p)) for p, i in zip(prompts, ids, strict=True)]
    ids_BT, target_BT = models.collate(rows)
    logits = model(input_ids=ids_BT.to(model.device), use_cache=False).logits[:, :-1].float()
    logp = logits.log_softmax(dim=-1)
    entropy_BT = -(logp.exp() * logp).sum(dim=-1).cpu()
    return float(entropy_BT[target_BT[:, 1:] != -100].mean())


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its confidence interval over seeds (Student's t).

    The half-width of a single value is not known: nan. A value that is not known gives nan.
    """
    if any(math.isnan(value) for value in values):
        return float("nan"), float("nan")
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan")
    spread = statistics.stdev(values) / len(values) ** 0.5
    return mean, quantile(0.5 + confidence / 2, len(values) - 1) * spread


@cache
def quantile(p: float, df: int) -> float:
    """Of Student's t with df degrees of freedom, for p > 0.5: t = sqrt(df (1 / x - 1)), where the
    regularised incomplete beta function of x is twice the tail."""
    low, high = 0.0, 1.0
    for _ in range(80):
        x = (low + high) / 2
        tail = mpmath.betainc(df / 2, 0.5, 0, x, regularized=True) / 2
        low, high = (x, high) if tail < 1 - p else (low, x)
    return (df * (1 / high - 1)) ** 0.5


__all__ = ["answers", "grades", "interval", "measure", "quantile", "text_of", "win_rate"]
