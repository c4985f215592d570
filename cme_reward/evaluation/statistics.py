"""What preferences say: a rate with its interval, the rate at equal length, agreement, entropy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cme_reward.ranking.statistics import DRAWS, NOTHING, Estimate

Float64 = NDArray[np.float64]
RIDGE = 1e-3
"""Keeps a model that always wins at a finite coefficient; far below the weight of one pair."""
STEPS = 100
"""Most Newton steps; a dozen are taken."""
EDGE = 0.05
CHUNK = 100
"""Draws of the bootstrap made at a time, which bounds the memory they take."""


def entropy(preference: float) -> float:
    """-p log p - (1-p) log(1-p) in nats: 0 where a judge is sure, log 2 = 0.693 where it is not."""
    return float(-sum(p * np.log(p) for p in (preference, 1 - preference) if p > 0))


def win_rate(preferences: Float64, seed: int = 0) -> Estimate:
    """Mean of the preferences (1 for a win, 1/2 for a tie, 0): (wins + ties / 2) / N.

    Its 95 % interval is by bootstrap over prompts, of which each has one preference. NaN without
    any.
    """
    n = len(preferences)
    if not n:
        return NOTHING
    draw = np.random.default_rng(seed)
    means = [
        preferences[draw.integers(n, size=(min(CHUNK, DRAWS - done), n))].mean(axis=1)
        for done in range(0, DRAWS, CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(preferences.mean()), float(low), float(high))


def length_controlled(preferences: Float64, longer_by: Float64) -> float:
    """The win rate, were all responses as long as the baseline's.

    Logistic regression of the preference y (1, 1/2, 0) on an intercept and on length:

        P(y) = sigmoid(a + b tanh(d / sd(d))),    rate = sigmoid(a)

    with d the difference of the lengths. As in AlpacaEval 2 (Dubois et al. 2024, "Length-Controlled
    AlpacaEval", Eq. 2), without its term for the difficulty of a prompt. It is fitted by Newton
    steps, halved where they overshoot, to the cross entropy plus RIDGE / 2 (a^2 + b^2).

    Args:
        preferences: for the model against the baseline, `[N]`.
        longer_by: characters by which the model's response is longer, `[N]`.

    Returns:
        The rate. NaN without pairs, and where all differ by the same length other than 0: nothing
        then tells length from quality.
    """
    if not len(preferences):
        return float("nan")
    spread = float(longer_by.std())
    if not spread:
        return float("nan") if longer_by.any() else float(preferences.mean())
    features = np.stack([np.ones(len(longer_by)), np.tanh(longer_by / spread)], axis=1)
    weights = np.zeros(2)

    def loss(weights: Float64) -> float:
        logits = features @ weights
        fit = np.logaddexp(0, logits).sum() - preferences @ logits
        return float(fit + RIDGE / 2 * weights @ weights)

    for _ in range(STEPS):
        chance = _sigmoid(features @ weights)
        slope = features.T @ (chance - preferences) + RIDGE * weights
        curvature = (features.T * (chance * (1 - chance))) @ features + RIDGE * np.eye(2)
        step, now = np.linalg.solve(curvature, slope), loss(weights)
        while loss(weights - step) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return float(_sigmoid(weights[:1])[0])


def extrapolates(longer_by: Float64) -> bool:
    """Whether hardly any pair says what happens at equal length.

    True where less than EDGE of the pairs have a longer response of the model's, or less than that
    a shorter one; responses of equal length count for both. Of one pair at least.
    """
    return bool(min((longer_by >= 0).mean(), (longer_by <= 0).mean()) < EDGE)


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two judges: (agreement - chance) / (1 - chance).

    Chance is how often they would agree if each gave its outcomes to the pairs at random. NaN
    without pairs, and where both gave all pairs one and the same outcome.
    """
    n = len(first)
    if not n:
        return float("nan")
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(first.count(x) * second.count(x) for x in set(first)) / n**2
    return (agreed - chance) / (1 - chance) if chance < 1 else float("nan")


def _sigmoid(logits: Float64) -> Float64:
    return np.exp(-np.logaddexp(0, -logits))
