"""A threshold whose risk holds: by hand, against exact sums, and over many draws."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from cme_reward import InputError
from cme_reward.evaluation.calibration import (
    CONFIDENCES,
    DELTA,
    THRESHOLDS,
    calibrate,
    upper_bound,
)
from cme_reward.evaluation.statistics import entropy

EACH = DELTA / 8


def test_the_thresholds_hold_all_that_two_verdicts_can_say() -> None:
    assert len(CONFIDENCES) == len(THRESHOLDS) == 8
    assert list(THRESHOLDS) == sorted(THRESHOLDS)
    for p in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert min(t - entropy(p) for t in THRESHOLDS if t >= entropy(p)) < 1e-6


def test_the_bound_by_hand() -> None:
    # none wrong of 49: (1 - p)^49 = 0.00625, p = 1 - exp(ln(0.00625) / 49) = 0.0984
    assert upper_bound(0, 49, EACH) == pytest.approx(1 - 0.00625 ** (1 / 49))
    assert upper_bound(0, 49, EACH) < 0.1 < upper_bound(0, 48, EACH)
    # one wrong of two: (1 - p)^2 + 2 p (1 - p) = 1 - p^2 = 0.05
    assert upper_bound(1, 2, 0.05) == pytest.approx(math.sqrt(0.95))
    assert upper_bound(3, 3, 0.05) == upper_bound(0, 0, 0.05) == 1


@pytest.mark.parametrize(("wrong", "n"), [(0, 5), (3, 40), (17, 200), (90, 100)])
def test_the_bound_against_exact_sums(wrong: int, n: int) -> None:
    p = Fraction(upper_bound(wrong, n, 0.01))
    at_most = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(wrong + 1))
    assert float(at_most) == pytest.approx(0.01, rel=1e-6)


def counts(*rows: tuple[float, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Uncertainties and whether they are wrong, of (preference, pairs, wrong ones)."""
    unsure = np.concatenate([np.full(n, entropy(p)) for p, n, _ in rows])
    wrong = np.concatenate([np.arange(n) < w for _, n, w in rows])
    return unsure, wrong


def test_the_highest_threshold_that_holds_is_taken() -> None:
    # Bounds at 0.00625: 1 of 100 0.072, 4 of 140 0.090, 34 of 200 0.26.
    rows = (1.0, 100, 1), (0.75, 40, 3), (0.5, 60, 30)
    found = calibrate("j", *counts(*rows), 0.1)
    assert (found.threshold, found.kept, found.wrong) == (THRESHOLDS[6], 140, 4)
    assert (found.pairs, found.coverage) == (200, 0.7)
    assert found.risk == pytest.approx(4 / 140)
    assert found.bound == upper_bound(4, 140, EACH) < 0.1
    assert calibrate("j", *counts(*rows), 0.08).kept == 100
    assert calibrate("j", *counts(*rows), 0.3).threshold == THRESHOLDS[-1] == 0.693148
    # A doubtful few among the most certain forbid nothing above them.
    assert calibrate("j", *counts((1.0, 3, 2), (0.75, 200, 2)), 0.1).kept == 203


def test_too_few_pairs_and_too_bad_a_judge_are_said_to_be() -> None:
    with pytest.raises(InputError) as caught:
        calibrate("some judge", *counts((1.0, 30, 0), (0.5, 10, 5)), 0.1)
    said = str(caught.value)
    assert "no threshold keeps the risk of some judge under it. Of 40 labelled pairs" in said
    assert "0 of 30 wrong, so that it is at most 0.16" in said
    assert "at this share, 49 would do" in said
    with pytest.raises(InputError, match="no number under 100,000 would do"):
        calibrate("j", *counts((1.0, 30, 6)), 0.1)
    with pytest.raises(InputError, match="Of 0 labelled pairs"):
        calibrate("j", np.zeros(0), np.zeros(0, dtype=bool), 0.1)


RISKS = {
    "rising": (0.01, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5),
    "at the level": (0.1,) * 8,
    "just above it": (0.101,) * 8,
    "falling": (0.4, 0.3, 0.2, 0.1, 0.08, 0.05, 0.05, 0.05),
    "to and fro": (0.02, 0.3, 0.01, 0.2, 0.01, 0.3, 0.01, 0.5),
}


@pytest.mark.parametrize("risks", RISKS.values(), ids=RISKS)
def test_the_risk_is_above_the_level_in_no_more_draws_than_it_may(
    risks: tuple[float, ...],
) -> None:
    """Uncertainties anywhere between the thresholds, or at them; a true risk that is known."""
    draw = np.random.default_rng(0)
    level, draws, n = 0.1, 400, 300
    share = draw.dirichlet(np.full(8, 2.0))
    true_risk = np.cumsum(share * risks) / np.cumsum(share)
    edges = np.array([-1e-9, *THRESHOLDS])
    above = 0
    for _ in range(draws):
        cell = draw.choice(8, size=n, p=share)
        unsure = edges[cell + 1] - draw.random(n) * (edges[cell + 1] - edges[cell]) * 0.99
        wrong = draw.random(n) < np.array(risks)[cell]
        try:
            found = calibrate("j", unsure, wrong, level)
        except InputError:
            continue
        assert found.wrong / found.kept < level
        above += bool(true_risk[THRESHOLDS.index(found.threshold)] > level)
    slack = 3 * math.sqrt(DELTA * (1 - DELTA) / draws)
    assert above / draws <= DELTA + slack
