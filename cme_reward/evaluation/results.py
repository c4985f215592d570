"""Judgments -> an outcome of each pair -> what each judge says of each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from cme_reward.evaluation.judge import FAILED, UNREADABLE, VERDICTS
from cme_reward.evaluation.pairs import Pair
from cme_reward.evaluation.run import Question
from cme_reward.evaluation.statistics import (
    entropy,
    extrapolates,
    kappa,
    length_controlled,
    win_rate,
)
from cme_reward.ranking.statistics import Estimate

WIN, TIE, LOSS, INCONSISTENT, ABSTAINED = "win", "tie", "loss", "inconsistent", "abstained"
OUTCOMES = (WIN, TIE, LOSS, INCONSISTENT, ABSTAINED, UNREADABLE, FAILED)


@dataclass(frozen=True)
class Outcome:
    """What a judge says of a pair, from the model's side."""

    pair: Pair
    judge: str
    says: str
    """One of OUTCOMES."""
    verdict: str = ""
    """WIN, TIE or LOSS, abstained from or not; empty where there is none."""
    preference: float = float("nan")
    """1 for the model, 0 for the baseline; NaN where there is none."""
    uncertainty: float = float("nan")
    """Entropy of the preference, averaged over both orders, in nats."""
    judgments: list[Mapping[str, Any]] = field(default_factory=list)
    """As the journal has them."""

    @property
    def counts(self) -> bool:
        """Whether it is among the N of a win rate."""
        return self.says in (WIN, TIE, LOSS, INCONSISTENT)


@dataclass(frozen=True)
class Result:
    """A judge's outcomes of a model against the baseline."""

    judge: str
    model: str
    baseline: str
    rate: Estimate
    controlled: Estimate
    """The rate at equal length."""
    extrapolated: bool
    """Whether hardly any pair is of about equal length, so that `controlled` is a guess."""
    counts: Counter[str]
    """Of OUTCOMES; an inconsistent pair is also a tie."""

    @property
    def n(self) -> int:
        return self.counts[WIN] + self.counts[TIE] + self.counts[LOSS]


@dataclass(frozen=True)
class Mean:
    """A model's rate by several judges together, as the paper's tables have it: of the pairs with
    an outcome of every judge, the mean of their preferences."""

    model: str
    judges: int
    rate: Estimate
    controlled: Estimate
    n: int


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa of two judges, on the pairs of which both say something."""

    judges: tuple[str, str]
    kappa: float
    pairs: int


def outcome_of(pair: Pair, judge: str, judgments: Sequence[Mapping[str, Any]]) -> Outcome:
    """The outcome of a pair from its judgments, one or one for each order.

    Of verdicts alone: different ones are a tie, called inconsistent. Of chances (a judge's
    log-probs): each order's are averaged, preference = p(win) + p(tie) / 2, and the verdict is the
    likeliest of the three. A judgment that failed or cannot be read leaves the pair without an
    outcome.
    """
    kept = list(judgments)
    for missing in (FAILED, UNREADABLE):
        if any(one["verdict"] == missing for one in kept):
            return Outcome(pair, judge, missing, judgments=kept)
    said = [_chances(one, pair.model) for one in kept]
    win, loss, tie = (sum(chances) / len(kept) for chances in zip(*said, strict=True))
    preference = win + tie / 2
    unsure = entropy(preference)
    if len(set(said)) > 1 and not all("chances" in one for one in kept):
        return Outcome(pair, judge, INCONSISTENT, TIE, 0.5, unsure, kept)
    verdict = WIN if win > max(loss, tie) else LOSS if loss > max(win, tie) else TIE
    return Outcome(pair, judge, verdict, verdict, preference, unsure, kept)


def _chances(judgment: Mapping[str, Any], model: str) -> tuple[float, float, float]:
    """Of a win, a loss and a tie of the model's; 0 and 1 where there is a verdict alone."""
    a, b, tie = judgment.get("chances") or [float(judgment["verdict"] == x) for x in VERDICTS]
    return (a, b, tie) if judgment["order"][0] == model else (b, a, tie)


def side(preference: float) -> str:
    return WIN if preference > 0.5 else LOSS if preference < 0.5 else TIE


def outcomes_of(
    questions: Sequence[Question], known: Mapping[str, Mapping[str, Any]]
) -> list[Outcome]:
    """The outcomes of all questions asked, `known` having a judgment of each by its key."""
    of: dict[tuple[str, int], list[Question]] = {}
    for question in questions:
        of.setdefault((question.judge.name, id(question.pair)), []).append(question)
    return [
        outcome_of(asked[0].pair, judge, [known[one.key] for one in asked])
        for (judge, _), asked in of.items()
    ]


def abstaining(one: Outcome, above: float | None) -> Outcome:
    """The outcome, or ABSTAINED where it is more uncertain than `above` nats."""
    return replace(one, says=ABSTAINED) if above is not None and one.uncertainty > above else one


def results_of(outcomes: Sequence[Outcome], seed: int = 0) -> list[Result]:
    """One of each judge and model, in the order in which they first occur."""
    of: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        of.setdefault((one.judge, one.pair.model), []).append(one)
    found = []
    for (judge, model), own in of.items():
        counted = [one for one in own if one.counts]
        preferences = np.array([one.preference for one in counted])
        longer_by = np.array([one.pair.longer_by for one in counted], dtype=float)
        counts = Counter(one.says for one in own)
        counts[TIE] += counts[INCONSISTENT]
        found.append(
            Result(
                judge,
                model,
                own[0].pair.baseline,
                win_rate(preferences, seed),
                length_controlled(preferences, longer_by, seed),
                len(counted) > 0 and extrapolates(longer_by),
                counts,
            )
        )
    return found


def means_of(outcomes: Sequence[Outcome], seed: int = 0) -> list[Mean]:
    """One of each model, in the order in which they first occur; none of a single judge."""
    judges = len({one.judge for one in outcomes})
    of: dict[str, dict[int, list[Outcome]]] = {}
    for one in outcomes if judges > 1 else ():
        of.setdefault(one.pair.model, {}).setdefault(id(one.pair), []).append(one)
    found = []
    for model, pairs in of.items():
        whole = [own for own in pairs.values() if sum(one.counts for one in own) == judges]
        preferences = np.array(
            [sum(one.preference for one in own) / judges for own in whole], dtype=float
        )
        longer_by = np.array([own[0].pair.longer_by for own in whole], dtype=float)
        rate = win_rate(preferences, seed)
        controlled = length_controlled(preferences, longer_by, seed)
        found.append(Mean(model, judges, rate, controlled, len(whole)))
    return found


def agreements_of(outcomes: Sequence[Outcome]) -> list[Agreement]:
    """Between each two judges, pairs that they abstained from included."""
    said: dict[str, dict[int, str]] = {}
    for one in outcomes:
        own = said.setdefault(one.judge, {})
        if one.verdict:
            own[id(one.pair)] = one.verdict
    found = []
    for a, b in combinations(said, 2):
        both = [pair for pair in said[a] if pair in said[b]]
        share = kappa([said[a][pair] for pair in both], [said[b][pair] for pair in both])
        found.append(Agreement((a, b), share, len(both)))
    return found
