"""How well a score ranks: pairs, intervals over prompts, length, risk against coverage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
DRAWS = 2_000
EQUAL = 0.1
"""Lengths that differ by at most this share of the longer one, or by one token, are equal."""


@dataclass(frozen=True)
class Pairs:
    """Two responses of one group, the better one first."""

    better: NDArray[np.int64]
    worse: NDArray[np.int64]
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.better)

    def at(self, which: NDArray[np.bool_]) -> Pairs:
        return Pairs(self.better[which], self.worse[which], self.group[which])

    def points(self, scores: Float64) -> Float64:
        """1 where the better one has the higher score, 1/2 for equal scores, 0."""
        return (np.sign(scores[self.better] - scores[self.worse]) + 1) / 2

    def equal_length(self, lengths: Float64) -> Pairs:
        a, b = lengths[self.better], lengths[self.worse]
        return self.at(np.abs(a - b) <= np.maximum(EQUAL * np.maximum(a, b), 1))


class Estimate(NamedTuple):
    """A share or a correlation with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "-"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def members_of(groups: Sequence[Hashable]) -> list[list[int]]:
    """Positions of each group's responses, groups in the order in which they first occur."""
    members: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    return list(members.values())


def pairs_of(groups: Sequence[Hashable], labels: Sequence[float | None]) -> Pairs:
    """All pairs of responses of one group whose labels differ."""
    better, worse, of = [], [], []
    for number, rows in enumerate(_labelled(groups, labels)):
        own = np.array([labels[k] for k in rows], dtype=float)
        above, below = np.nonzero(own[:, None] > own[None, :])
        better.append(np.array(rows)[above])
        worse.append(np.array(rows)[below])
        of.append(np.full(len(above), number))
    none = np.zeros(0, dtype=np.int64)
    return Pairs(*(np.concatenate([none, *parts]) for parts in (better, worse, of)))


def accuracy(pairs: Pairs, scores: Float64, seed: int = 0) -> Estimate:
    """Share of pairs with the better response first (ties half); 95 % by bootstrap over groups.

    NaN without pairs.
    """
    return _over_groups(pairs.points(scores), pairs.group, seed)


def difference(pairs: Pairs, first: Float64, second: Float64, seed: int = 0) -> Estimate:
    """Accuracy of the first score minus the second's on the same pairs, and its interval."""
    return _over_groups(pairs.points(first) - pairs.points(second), pairs.group, seed)


def _over_groups(points: Float64, group: NDArray[np.int64], seed: int) -> Estimate:
    if not len(points):
        return NOTHING
    _, of = np.unique(group, return_inverse=True)
    sums = np.stack([np.bincount(of, points), np.bincount(of)], axis=1)
    n = len(sums)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS) @ sums
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return Estimate(float(points.mean()), float(low), float(high))


def auroc(labels: Float64, scores: Float64) -> float:
    """Chance that a response of label 1 has a higher score than one of label 0, over all prompts.

    NaN where there are not both.
    """
    ranks = _ranks(scores)
    good = labels > 0
    n, m = int(good.sum()), int((~good).sum())
    if not n or not m:
        return float("nan")
    return float((ranks[good].sum() - n * (n + 1) / 2) / (n * m))


def within_groups(groups: Sequence[Hashable], first: Float64, second: Float64) -> float:
    """Spearman's correlation of two numbers of responses within groups, pooled.

    Ranks are taken in each group, and their means subtracted: what two prompts have in common or
    not does not count. NaN where nothing varies.
    """
    a, b = [], []
    for rows in members_of(groups):
        if len(rows) > 1:
            middle = (len(rows) + 1) / 2
            a.append(_ranks(first[rows]) - middle)
            b.append(_ranks(second[rows]) - middle)
    x, y = np.concatenate([np.zeros(0), *a]), np.concatenate([np.zeros(0), *b])
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else float("nan")


def _ranks(values: Float64) -> Float64:
    """From 1, equal values sharing the mean of theirs."""
    _, of, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[of]


def risk_coverage(pairs: Pairs, scores: Float64) -> tuple[Float64, Float64]:
    """Coverage and risk: of the pairs with the widest margins, a share, how many are wrong.

    Pairs of equal margin are taken together. Empty without pairs.
    """
    margin = np.abs(scores[pairs.better] - scores[pairs.worse])
    order = np.argsort(-margin, kind="stable")
    wrong = np.cumsum(1 - pairs.points(scores)[order])
    last = np.append(np.diff(margin[order]) != 0, True)[: len(order)]
    n = np.arange(1, len(order) + 1)
    return (n / max(len(order), 1))[last], (wrong / n)[last]


def by_length(pairs: Pairs, scores: Float64, lengths: Float64) -> list[tuple[str, int, Estimate]]:
    """Accuracy by how long the better response is, against the worse one."""
    ratio = lengths[pairs.better] / np.maximum(lengths[pairs.worse], 1)
    edges = [0, 0.5, 0.8, 1.25, 2, np.inf]
    names = ["under half as long", "shorter", "about as long", "longer", "over twice as long"]
    found = []
    for name, low, high in zip(names, edges, edges[1:], strict=False):
        part = pairs.at((ratio >= low) & (ratio < high))
        found.append((name, len(part), accuracy(part, scores)))
    return found


def best_of_n(
    groups: Sequence[Hashable], labels: Sequence[float | None], scores: Float64
) -> tuple[float, float, float]:
    """Mean label of the response with the highest score, of one drawn at random, and of the best.

    Over groups with two labelled responses or more; equal scores share. NaN without such.
    """
    rows = []
    for group in _labelled(groups, labels):
        if len(group) > 1:
            own = np.array([labels[k] for k in group], dtype=float)
            top = scores[group] == scores[group].max()
            rows.append((own[top].mean(), own.mean(), own.max()))
    picked, drawn, best = np.mean(rows, axis=0) if rows else (float("nan"),) * 3
    return float(picked), float(drawn), float(best)


def _labelled(groups: Sequence[Hashable], labels: Sequence[float | None]) -> list[list[int]]:
    """`members_of`, without what has no label."""
    known = [[k for k in rows if labels[k] is not None] for rows in members_of(groups)]
    return [rows for rows in known if rows]
