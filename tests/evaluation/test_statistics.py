"""The numbers of an evaluation, by hand and against the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cme_reward.evaluation.statistics import (
    RIDGE,
    entropy,
    extrapolates,
    kappa,
    length_controlled,
    win_rate,
)


def test_entropy_by_hand() -> None:
    assert str(entropy(1.0)) == str(entropy(0.0)) == "0.0"  # no negative zero
    assert entropy(0.5) == pytest.approx(math.log(2))
    # a win in one order and a tie in the other: 3/4
    assert entropy(0.75) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_a_win_rate_counts_ties_half() -> None:
    # 3 wins, 2 ties, 3 losses: (3 + 1) / 8
    rate = win_rate(np.array([1, 1, 1, 0.5, 0.5, 0, 0, 0]))
    assert rate.value == 0.5
    assert rate.low < 0.5 < rate.high
    assert np.isnan(win_rate(np.zeros(0)).value)
    assert win_rate(np.ones(7)) == (1.0, 1.0, 1.0)


def test_the_interval_is_about_the_normal_one_of_many_prompts() -> None:
    preferences = np.repeat([1.0, 0.0], [300, 100])
    rate = win_rate(preferences)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert rate.low == pytest.approx(0.75 - half, abs=0.01)
    assert rate.high == pytest.approx(0.75 + half, abs=0.01)
    assert win_rate(preferences) == rate
    assert win_rate(preferences, seed=1) != rate


def test_kappa_by_hand() -> None:
    # agree on 3 of 4; chance (2 x 3 + 2 x 1) / 16 = 1/2; (3/4 - 1/2) / (1 - 1/2)
    assert kappa(["a", "a", "b", "b"], ["a", "a", "a", "b"]) == pytest.approx(0.5)
    assert kappa(["a", "b"], ["a", "b"]) == 1.0
    assert kappa(["a", "b"], ["b", "a"]) == -1.0
    assert math.isnan(kappa(["a", "a"], ["a", "a"]))
    assert math.isnan(kappa([], []))


def test_without_an_effect_of_length_the_controlled_rate_is_the_plain_one() -> None:
    # at each length 3 of 4 are won
    preferences = np.tile([1.0, 1.0, 1.0, 0.0], 50)
    longer_by = np.repeat([-200.0, -100.0, 0.0, 100.0, 200.0], 40)
    assert length_controlled(preferences, longer_by).value == pytest.approx(0.75, abs=1e-4)
    assert length_controlled(preferences, np.zeros(200)) == win_rate(preferences)


def test_a_model_that_wins_by_length_alone_is_at_one_half() -> None:
    longer_by = np.array([300.0] * 90 + [-300.0] * 10)
    preferences = np.array([1.0] * 72 + [0.0] * 18 + [1.0] * 2 + [0.0] * 8)
    assert preferences.mean() == 0.74
    assert length_controlled(preferences, longer_by).value == pytest.approx(0.5, abs=1e-3)


def test_the_fit_is_the_least_of_a_grid() -> None:
    draw = np.random.default_rng(0)
    longer_by = draw.normal(100, 300, 60)
    chance = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer_by / 300))))
    preferences = np.where(draw.random(60) < 0.1, 0.5, draw.random(60) < chance)
    x = np.tanh(longer_by / longer_by.std())
    a, b = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-1, 5, 601), indexing="ij")
    logits = a[..., None] + b[..., None] * x
    loss = (np.logaddexp(0, logits) - preferences * logits).sum(-1) + RIDGE / 2 * (a**2 + b**2)
    best = a.ravel()[loss.argmin()]
    found, low, high = length_controlled(preferences, longer_by)
    assert low < found < high
    assert math.log(found / (1 - found)) == pytest.approx(best, abs=0.011)


def test_a_model_that_always_wins_has_a_rate() -> None:
    draw = np.random.default_rng(0)
    assert 0.99 < length_controlled(np.ones(50), draw.normal(0, 100, 50)).value <= 1
    separable = np.repeat([1.0, 0.0], 50)
    # length alone decides: any intercept between the two fits, and the interval says so
    longer_by = np.concatenate([draw.uniform(10, 300, 50), draw.uniform(-300, -10, 50)])
    _, low, high = length_controlled(separable, longer_by)
    assert low < 0.3
    assert high > 0.7


def test_length_and_quality_that_nothing_tells_apart() -> None:
    assert math.isnan(length_controlled(np.ones(3), np.full(3, 10.0)).value)
    assert math.isnan(length_controlled(np.zeros(0), np.zeros(0)).value)
    assert extrapolates(np.array([-5.0] * 39 + [5.0]))
    assert not extrapolates(np.array([-5.0] * 9 + [5.0]))
    assert not extrapolates(np.zeros(3))
