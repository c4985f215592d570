"""What preferences say: a rate with its interval, the rate at equal length, agreement, entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward.ranking.statistics import DRAWS, NOTHING, Estimate

Float64 = NDArray[np.float64]
RIDGE = 1e-3
"""Keeps a model that always wins at a finite coefficient; far below the weight of one pair."""
STEPS, HALVINGS = 50, 30
"""Most Newton steps, and halvings of each; a dozen and hardly any are taken."""
FITS = 500
"""Draws of the bootstrap of a regression."""
EDGE = 0.05
"""Pairs on one side of equal length, as a share, under which a rate there is extrapolated."""
CHUNK = 100
"""Draws of the bootstrap made at a time, which bounds the memory they take."""


def entropy(preference: float) -> float:
    """-p log p - (1-p) log(1-p) in nats: 0 where a judge is sure, log 2 = 0.693 where it is not."""
    return -sum(float(p * np.log(p)) for p in (preference, 1 - preference) if p > 0) + 0.0


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


def length_controlled(preferences: Float64, longer_by: Float64, seed: int = 0) -> Estimate:
    """The win rate, were all responses as long as the baseline's.

    Logistic regression of the preference y (1, 1/2, 0) on an intercept and on length:

        P(y) = sigmoid(a + b tanh(d / sd(d))),    rate = sigmoid(a)

    with d the difference of the lengths. As in AlpacaEval 2 (Dubois et al. 2024, "Length-Controlled
    AlpacaEval", arXiv 2404.04475), without its term `(psi_m - psi_b) gamma_x`: the difficulty
    gamma_x of each prompt is fitted there to the preferences of a leaderboard's many models, and
    from the few models of one call it would be little but their own outcomes. It is fitted by
    Newton steps, halved where they overshoot, to the cross entropy plus RIDGE / 2 (a^2 + b^2); the
    95 % interval is by bootstrap over prompts, with sd(d) as it is.

    Args:
        preferences: for the model against the baseline, `[N]`.
        longer_by: characters by which the model's response is longer, `[N]`.
        seed: of the bootstrap.

    Returns:
        The rate. NaN without pairs, and where all differ by the same length other than 0: nothing
        then tells length from quality.
    """
    n = len(preferences)
    spread = float(longer_by.std()) if n else 0.0
    if not spread:
        return NOTHING if longer_by.any() else win_rate(preferences, seed)
    features = np.stack([np.ones(n), np.tanh(longer_by / spread)], axis=1)
    draw = np.random.default_rng(seed)
    fits = [_fit(features, preferences, np.ones((1, n)))]
    for _ in range(0, FITS, CHUNK):
        fits.append(_fit(features, preferences, draw.multinomial(n, np.full(n, 1 / n), size=CHUNK)))
    value, *drawn = _sigmoid(np.concatenate(fits)[:, 0])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _fit(features: Float64, preferences: Float64, times: NDArray[Any]) -> Float64:
    """Coefficients `[D, 2]` of D regressions, in which each pair counts `times` `[D, N]`."""
    found = np.zeros((len(times), 2))

    def loss(found: Float64) -> Float64:
        logits = found @ features.T
        fit = np.logaddexp(0, logits) - preferences * logits
        return (times * fit).sum(axis=1) + RIDGE / 2 * (found**2).sum(axis=1)

    for _ in range(STEPS):
        chance = _sigmoid(found @ features.T)
        slope = (times * (chance - preferences)) @ features + RIDGE * found
        curvature = np.einsum("dn,ni,nj->dij", times * chance * (1 - chance), features, features)
        curvature += RIDGE * np.eye(2)
        step, now = np.linalg.solve(curvature, slope[..., None])[..., 0], loss(found)
        for _ in range(HALVINGS):
            worse = loss(found - step) > now
            if not worse.any():
                break
            step[worse] /= 2
        found = found - step
        if np.abs(step).max() < 1e-6:
            break
    return found


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
