"""Ranked responses -> a table, warnings, and a sentence that says whether to train with this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cme_reward.ranking import statistics
from cme_reward.ranking.ranked import SHORTER, UNREPEATED, Ranked, boilerplate
from cme_reward.ranking.statistics import Estimate, Pairs

Float64 = NDArray[np.float64]
Colour = Literal["red", "yellow", "green"]
EXPLAINED = 0.5
"""A correlation within prompts from which on something else may explain a reward."""


@dataclass(frozen=True)
class Column:
    """One score, and what it is worth."""

    name: str
    accuracy: Estimate
    """Better above worse, in pairs of one prompt."""
    equal_length: Estimate
    """The same, of pairs of equal length."""
    auroc: float
    """Over all prompts; NaN where labels are other than true and false."""
    length: float
    """Spearman's correlation with length, within prompts."""
    picked: float
    """Mean label of the best of a prompt's responses by this score."""


@dataclass(frozen=True)
class Verdict:
    """Whether to train with a score."""

    colour: Colour
    text: str


@dataclass(frozen=True)
class Report:
    """What a file says about the scores of its responses."""

    ranked: list[Ranked]
    pairs: Pairs
    equal: Pairs
    """Those of equal length."""
    columns: list[Column]
    drawn: float
    """Mean label of a prompt's response drawn at random."""
    best: float
    """Mean label of a prompt's best response."""
    agreement: list[tuple[str, str, float, int]]
    """Two verifiers' means: the share of pairs that both put the same way, and how many pairs."""
    warnings: list[str]
    verdicts: list[Verdict]
    """On the first score, and on those of the other verifiers."""

    @property
    def verdict(self) -> Verdict:
        """On the first score."""
        return self.verdicts[0]

    @property
    def prefers_worse(self) -> bool:
        """Whether the first score decidedly puts worse responses first."""
        return self.columns[0].accuracy.high < 0.5

    @property
    def by_length(self) -> list[tuple[str, int, Estimate]]:
        """The first score's accuracy by the length of the better response, see `statistics`."""
        lengths = np.array([one.tokens for one in self.ranked], dtype=float)
        return statistics.by_length(self.pairs, self.scores(self.columns[0].name), lengths)

    @property
    def risk_coverage(self) -> tuple[Float64, Float64]:
        """The first score's risk against coverage, see `statistics`."""
        return statistics.risk_coverage(self.pairs, self.scores(self.columns[0].name))

    @property
    def prompts(self) -> int:
        return len({one.group for one in self.ranked})

    def scores(self, name: str) -> Float64:
        return _scores(self.ranked, name)

    def misranked(self, n: int) -> list[tuple[Ranked, Ranked]]:
        """The pairs that the first score puts the wrong way round by most, one of a prompt."""
        scores = self.scores(self.columns[0].name)
        by = scores[self.pairs.worse] - scores[self.pairs.better]
        found: dict[int, tuple[Ranked, Ranked]] = {}
        for k in np.argsort(-by, kind="stable"):
            if by[k] <= 0 or len(found) >= n:
                break
            pair = self.ranked[self.pairs.better[k]], self.ranked[self.pairs.worse[k]]
            found.setdefault(int(self.pairs.group[k]), pair)
        return list(found.values())


def report(ranked: list[Ranked], verifiers: Sequence[str] = ()) -> Report:
    """The report on responses that have been scored, at least one; by its first score.

    `verifiers` are scores to be compared with each other, one of each verifier.
    """
    groups = [one.group for one in ranked]
    labels = [one.label for one in ranked]
    lengths = np.array([one.tokens for one in ranked], dtype=float)
    pairs = statistics.pairs_of(groups, labels)
    equal = pairs.equal_length(lengths)
    known = np.array([label is not None for label in labels])
    marks = np.array([label or 0.0 for label in labels])
    two = set(marks[known].tolist()) == {0.0, 1.0}
    columns = []
    for name in ranked[0].scores:
        scores = _scores(ranked, name)
        columns.append(
            Column(
                name,
                statistics.accuracy(pairs, scores),
                statistics.accuracy(equal, scores),
                statistics.auroc(marks[known], scores[known]) if two else float("nan"),
                statistics.within_groups(groups, scores, lengths),
                statistics.best_of_n(groups, labels, scores)[0],
            )
        )
    first = columns[0].name
    _, drawn, best = statistics.best_of_n(groups, labels, _scores(ranked, first))
    judged = columns[:1]
    if len(pairs):
        judged += [c for c in columns[1:] if c.name in verifiers]
    return Report(
        ranked, pairs, equal, columns, drawn, best,
        _agreement(ranked, verifiers),
        _warnings(ranked, first), [_verdict(ranked, pairs, column) for column in judged],
    )  # fmt: skip


def _scores(ranked: Sequence[Ranked], name: str) -> Float64:
    return np.array([one.scores[name] for one in ranked])


def _verdict(ranked: list[Ranked], pairs: Pairs, column: Column) -> Verdict:
    accuracy, equal = column.accuracy, column.equal_length
    n = len(np.unique(pairs.group))
    if not len(pairs):
        return Verdict(
            "yellow",
            "No verdict: no two responses to one prompt have different labels (--label FIELD names "
            "the field that tells good from bad).",
        )
    said = f"{column.name} puts the better response first in {accuracy.value:.0%} of {len(pairs):,}"
    said += f" pairs ({accuracy.low:.0%} to {accuracy.high:.0%}, {n:,} prompts)"
    if accuracy.high < 0.5:
        return Verdict(
            "red",
            f"STOP. {said}: it prefers the WORSE responses. Training with it as a reward would "
            "teach them. Try another verifier, or another score of the table.",
        )
    if accuracy.low <= 0.5:
        return Verdict(
            "red",
            f"NOT SHOWN. {said}: no better than chance, as far as these prompts can tell. Try a "
            "stronger verifier, or more prompts.",
        )
    length = statistics.difference(pairs, _scores(ranked, column.name), _scores(ranked, SHORTER))
    if length.low <= 0:
        return Verdict(
            "yellow",
            f"DOUBTFUL. {said}, but this is not decidedly more than choosing the shorter one does "
            f"(difference {length}).",
        )
    if not equal.low > 0.5:
        return Verdict(
            "yellow",
            f"DOUBTFUL. {said}, but among responses of equal length it is {equal}: it may be their "
            "lengths that are ranked.",
        )
    return Verdict(
        "green",
        f"It ranks. {said}, and {equal} at equal length. Whether training with it helps is another "
        "question: a policy finds what no file holds.",
    )


def _agreement(ranked: list[Ranked], names: Sequence[str]) -> list[tuple[str, str, float, int]]:
    """Equal scores of either leave a pair out."""
    members = statistics.members_of([one.group for one in ranked])
    signs = {}
    for name in names:
        scores = _scores(ranked, name)
        parts = [np.sign(scores[g][:, None] - scores[g][None])[np.triu_indices(len(g), 1)]
                 for g in members]  # fmt: skip
        signs[name] = np.concatenate(parts)
    found = []
    for k, a in enumerate(names):
        for b in names[k + 1 :]:
            both = signs[a] * signs[b]
            counted = int(np.count_nonzero(both))
            share = float((both > 0).sum() / counted) if counted else float("nan")
            found.append((a, b, share, counted))
    return found


def _warnings(ranked: list[Ranked], first: str) -> list[str]:
    """What, other than quality, the first score goes with; labels are not looked at."""
    groups = [one.group for one in ranked]
    scores = _scores(ranked, first)
    lengths = np.array([one.tokens for one in ranked], dtype=float)
    found = []
    for what, values, more, less in (
        ("length", lengths, "longer", "shorter"),
        ("repetition", -_scores(ranked, UNREPEATED), "more repetitive", "less repetitive"),
        ("boilerplate (4-grams of other prompts' answers)", boilerplate(ranked), "more", "less"),
    ):
        rho = statistics.within_groups(groups, scores, values)
        if abs(rho) >= EXPLAINED:
            side = more if rho > 0 else less
            found.append(
                f"The score goes with {what}: correlation {rho:+.2f} within prompts. A policy "
                f"trained with it may learn {side} answers."
            )
    return found
