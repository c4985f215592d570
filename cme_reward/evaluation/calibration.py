"""From which uncertainty on a judge abstains, so that at most a share of its verdicts is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cme_reward.errors import InputError
from cme_reward.evaluation.statistics import entropy

CONFIDENCES = (1.0, 0.99, 0.95, 0.9, 0.8, 0.75, 0.65, 0.5)
"""Preferences whose entropies may be the threshold. Fixed before any pair is seen, as the bound
needs it; 1, 0.75 and 0.5 are all that two verdicts can give."""
THRESHOLDS = tuple(math.ceil(entropy(one) * 1e6) / 1e6 for one in CONFIDENCES)
"""In nats, rounded up: the last one, 0.693148, leaves out nothing."""
DELTA = 0.05
"""Chance of labelled pairs with which the risk is above the level after all."""
MOST = 100_000
"""Pairs up to which it is looked for how many would do."""


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what the labelled pairs say of it."""

    judge: str
    level: float
    """The risk asked for."""
    threshold: float
    """Nats; a pair more uncertain is abstained from."""
    pairs: int
    """Labelled ones, with a verdict."""
    kept: int
    """Of them, those not abstained from."""
    wrong: int
    """Of these, those with a wrong verdict."""
    bound: float
    """Upper bound of the risk, <= level."""

    @property
    def risk(self) -> float:
        return self.wrong / self.kept

    @property
    def coverage(self) -> float:
        return self.kept / self.pairs


def calibrate(
    judge: str, uncertainty: NDArray[np.float64], wrong: NDArray[np.bool_], level: float
) -> Calibration:
    """The highest threshold at which the risk is at most `level`, save with chance DELTA.

    Risk is the chance of a wrong verdict among those not abstained from. For each threshold t of
    THRESHOLDS its upper bound is Clopper and Pearson's at DELTA / 8, of w wrong ones among the n
    with uncertainty <= t:

        bound(t) = the p at which P(Binomial(n, p) <= w) = DELTA / len(THRESHOLDS)

    Given n, w is binomial, so that each bound holds but for that chance, and all of them at once
    but for DELTA (Bonferroni), whatever the risk's course: any t with bound(t) <= level is safe.
    This is "Learn then Test" (Angelopoulos et al., arXiv 2110.01052) for selective prediction.

    Args:
        judge: its name.
        uncertainty: of pairs drawn independently, as those to be judged are; nats, `[N]`.
        wrong: whether the verdict is wrong, `[N]`.
        level: between 0 and 1.

    Raises:
        InputError: where no threshold has such a bound, as without pairs; says how many would do.
    """
    found, delta = [], DELTA / len(THRESHOLDS)
    for threshold in THRESHOLDS:
        kept = uncertainty <= threshold
        n, w = int(kept.sum()), int(wrong[kept].sum())
        found.append(Calibration(judge, level, threshold, len(wrong), n, w, 1.0))
    safe = [one for one in found if _at_most(one.wrong, one.kept, level) <= delta]
    bounded = [
        replace(one, bound=upper_bound(one.wrong, one.kept, delta)) for one in safe[-1:] or found
    ]
    if not safe:
        raise InputError(_too_few(min(bounded, key=lambda one: one.bound)))
    return bounded[0]


def _too_few(best: Calibration) -> str:
    said = (
        f"--abstain-risk {best.level:g}: no threshold keeps the risk of {best.judge} under it. Of "
        f"{best.pairs:,} labelled pairs with a verdict, the bound is lowest at {best.threshold:g} "
        f"nats: {best.wrong:,} of {best.kept:,} wrong, so that it is at most {best.bound:.2g}; "
    )
    delta = DELTA / len(THRESHOLDS)
    share = best.wrong / best.kept if best.kept else 0.0
    enough, few = MOST, best.kept
    while enough - few > 1:
        middle = (enough + few) // 2
        good = _at_most(math.ceil(share * middle), middle, best.level) <= delta
        enough, few = (middle, few) if good else (enough, middle)
    if enough == MOST:
        return f"{said}no number under {MOST:,} would do at this share; name a higher level"
    return f"{said}at this share, {enough:,} would do; label more, or name a higher level"


def upper_bound(wrong: int, n: int, delta: float) -> float:
    """Clopper and Pearson's: the p with P(Binomial(n, p) <= wrong) = delta; 1 if all are wrong."""
    if wrong >= n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(wrong, n, middle) > delta else (low, middle)
    return high


def _at_most(wrong: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= wrong), 0 < p < 1, by its terms' logarithms."""
    k = np.arange(1, wrong + 1)
    odds = math.log(p) - math.log1p(-p)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k) + odds)])
    return float(np.exp(logs + n * math.log1p(-p)).sum())
