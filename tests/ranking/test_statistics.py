"""How well a score ranks, against loops and figures by hand."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from cme_reward.ranking import statistics
from cme_reward.ranking.ranked import Ranked, boilerplate, repeated
from cme_reward.ranking.report import report


def draw(seed: int, n: int = 60) -> tuple[list[int], list[float | None], np.ndarray, np.ndarray]:
    """Groups, labels of few values (some unknown), scores with ties, lengths."""
    rng = np.random.default_rng(seed)
    labels = [None if x == 3 else float(x) for x in rng.integers(4, size=n)]
    scores = rng.integers(6, size=n).astype(float)
    return rng.integers(9, size=n).tolist(), labels, scores, rng.integers(1, 40, n).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_and_accuracy_are_what_loops_find(seed: int) -> None:
    groups, labels, scores, lengths = draw(seed)
    known = [k for k, label in enumerate(labels) if label is not None]
    want = {
        (a, b)
        for a, b in product(known, known)
        if groups[a] == groups[b] and labels[a] > labels[b]  # type: ignore[operator]
    }
    pairs = statistics.pairs_of(groups, labels)
    assert set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == want
    assert len(pairs) == len(want)
    points = [1.0 if scores[a] > scores[b] else 0.5 * (scores[a] == scores[b]) for a, b in want]
    found = statistics.accuracy(pairs, scores)
    assert found.value == pytest.approx(sum(points) / len(points))
    assert found.low <= found.value <= found.high
    alike = [
        (a, b)
        for a, b in want
        if abs(lengths[a] - lengths[b]) <= max(1, 0.1 * max(lengths[a], lengths[b]))
    ]
    assert len(pairs.equal_length(lengths)) == len(alike)
    assert sum(n for _, n, _ in statistics.by_length(pairs, scores, lengths)) == len(want)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_chance_of_a_pair(seed: int) -> None:
    _, labels, scores, _ = draw(seed)
    marks = np.array([float((label or 0) > 1) for label in labels])
    pairs = list(product(scores[marks == 1], scores[marks == 0]))
    want = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert statistics.auroc(marks, scores) == pytest.approx(want)
    assert math.isnan(statistics.auroc(np.ones(3), scores[:3]))


def test_intervals_resample_groups_and_cover_what_is_true() -> None:
    """200 studies of 40 prompts whose pairs agree with each other: 95 % intervals hold 0.6."""
    rng = np.random.default_rng(0)
    held, naive = 0, 0
    for study in range(200):
        right = rng.random(40) < 0.6
        scores, groups, labels = [], [], []
        for prompt in range(40):
            scores += [1.0, 1.0, 0.0, 0.0] if right[prompt] else [0.0, 0.0, 1.0, 1.0]
            groups += [prompt] * 4
            labels += [1.0, 1.0, 0.0, 0.0]
        pairs = statistics.pairs_of(groups, labels)
        value, low, high = statistics.accuracy(pairs, np.array(scores), seed=study)
        held += low <= 0.6 <= high
        half = 1.96 * (value * (1 - value) / len(pairs)) ** 0.5
        naive += abs(value - 0.6) <= half
    assert held >= 0.9 * 200
    assert naive < 0.8 * 200, "pairs of a prompt are no independent draws"


def test_what_prompts_have_in_common_is_no_correlation() -> None:
    """Between prompts the longer scores higher, within each the shorter does."""
    groups = [0, 0, 0, 1, 1, 1]
    lengths = np.array([1.0, 2, 3, 11, 12, 13])
    scores = np.array([3.0, 2, 1, 13, 12, 11])
    assert statistics.within_groups(groups, scores, lengths) == pytest.approx(-1)
    assert statistics.within_groups(groups, scores, -lengths) == pytest.approx(1)
    assert math.isnan(statistics.within_groups(groups, np.ones(6), lengths))


def test_risk_falls_with_coverage_where_margins_know() -> None:
    pairs = statistics.pairs_of([0, 0, 1, 1, 2, 2, 3, 3], [1.0, 0.0] * 4)
    scores = np.array([9.0, 0, 5, 0, 0, 1, 2, 2])  # right by 9 and 5, wrong by 1, equal
    coverage, risk = statistics.risk_coverage(pairs, scores)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1.5 / 4])
    assert statistics.best_of_n([0, 0, 1, 1, 2], [1, 0, 0, 1, 1], scores[:5]) == (0.5, 0.5, 1)


def test_nothing_is_known_without_pairs() -> None:
    pairs = statistics.pairs_of([0, 0, 1], [1.0, 1.0, 0.0])
    assert len(pairs) == 0
    assert str(statistics.accuracy(pairs, np.zeros(3))) == "-"
    assert all(len(part) == 0 for part in statistics.risk_coverage(pairs, np.zeros(3)))
    assert all(map(math.isnan, statistics.best_of_n([0, 1], [1.0, None], np.zeros(2))))


def test_repetition_and_boilerplate() -> None:
    assert repeated("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated("a b c") == 0
    texts = ["as a language model I", "as a language model you", "as a language model I"]
    ranked = [
        Ranked(k, group, text) for k, (group, text) in enumerate(zip("xyx", texts, strict=True))
    ]
    assert boilerplate(ranked).tolist() == [0.5, 0.5, 0.5]  # "a language model I": x's alone


def ranked(rows: list[tuple[int, float, float, int]]) -> list[Ranked]:
    """Of group, label, score and length."""
    return [
        Ranked(k, group, f"text {k}", label, tokens, {
            "v: mean (Eq. 3)": score, "shorter wins": -tokens, "less repeated wins": 0.0
        })
        for k, (group, label, score, tokens) in enumerate(rows)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "colour", "says"),
    [
        ([(g, good, good, 9) for g in range(30) for good in (0, 1)], "green", "It ranks"),
        ([(g, good, -good, 9) for g in range(30) for good in (0, 1)], "red", "WORSE"),
        ([(g, good, good * (-1) ** g, 9) for g in range(30) for good in (0, 1)], "red",
         "NOT SHOWN"),
        ([(g, good, good, 9 - 5 * good) for g in range(30) for good in (0, 1)], "yellow",
         "choosing the shorter"),
        ([(g, good, good, 9 - (-1) ** g * 5 * good) for g in range(30) for good in (0, 1)],
         "yellow", "among responses of equal length it is -"),
        ([(g, 1, good, 9) for g in range(30) for good in (0, 1)], "yellow", "--label"),
    ],
)  # fmt: skip
def test_the_verdict(rows: list[Any], colour: str, says: str) -> None:
    found = report(ranked(rows))
    assert (found.verdict.colour, says in found.verdict.text) == (colour, True), found.verdict
    assert found.prefers_worse == ("STOP" in found.verdict.text)


def test_warnings_need_no_label() -> None:
    rows = [(g, 1.0, -float(n), n) for g in range(5) for n in (3, 5, 8)]
    found = report(ranked(rows))
    assert len(found.pairs) == 0
    (warning,) = found.warnings
    assert "length: correlation -1.00" in warning
    assert "shorter answers" in warning


def test_the_worst_pairs_are_of_different_prompts() -> None:
    found = report(ranked([(0, 1, 0, 9), (0, 0, 5, 9), (0, 0, 4, 9), (1, 1, 0, 9), (1, 0, 1, 9)]))
    lines = [(good.line, bad.line) for good, bad in found.misranked(9)]
    assert lines == [(0, 1), (3, 4)]
