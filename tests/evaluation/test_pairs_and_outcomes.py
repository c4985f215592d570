"""From answers to pairs, and from judgments to what is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cme_reward import InputError
from cme_reward.evaluation.pairs import Answer, Pair, pairs_of
from cme_reward.evaluation.results import (
    abstaining,
    agreements_of,
    means_of,
    outcome_of,
    results_of,
)

PAIR = Pair("p", "new", "old", "long answer", "answer")


def judgment(verdict: str, first: str = "new") -> dict[str, Any]:
    return {"verdict": verdict, "order": [first, "old" if first == "new" else "new"]}


def test_each_model_is_compared_with_the_baseline_where_both_answered() -> None:
    chat = [{"role": "user", "content": "p"}]
    answers = [
        Answer("p", "old", "1"),
        Answer("p", "new", "2"),
        Answer("q", "new", "3"),
        Answer("p", "other", "4"),
        Answer(chat, "new", "5"),  # not the text that it spells
    ]
    found = pairs_of(answers)
    assert [(x.model, x.baseline, x.response, x.reference) for x in found] == [
        ("new", "old", "2", "1"),
        ("other", "old", "4", "1"),
    ]
    assert {x.model for x in pairs_of(answers, "other")} == {"old", "new"}
    with pytest.raises(InputError, match="'nil' is no model of these files; they have old, new"):
        pairs_of(answers, "nil")
    with pytest.raises(InputError, match="all answers are old's"):
        pairs_of(answers[:1])
    with pytest.raises(InputError, match="no other model answered"):
        pairs_of([answers[0], answers[2]])


def test_the_order_depends_on_prompt_models_and_seed_alone() -> None:
    prompts = [str(k) for k in range(200)]
    first = [Pair(p, "new", "old", "a", "b").drawn(0) for p in prompts]
    assert first == [Pair(p, "old", "new", "x", "y").drawn(0) for p in prompts]
    assert first != [Pair(p, "new", "old", "a", "b").drawn(1) for p in prompts]
    assert 70 < first.count("new") < 130
    assert PAIR.shown("new") == ("long answer", "answer")
    assert PAIR.shown("old") == ("answer", "long answer")
    assert PAIR.longer_by == 5


@pytest.mark.parametrize(
    ("verdicts", "says", "preference", "uncertainty"),
    [
        ([judgment("A")], "win", 1, 0),
        ([judgment("A", "old")], "loss", 0, 0),
        ([judgment("TIE")], "tie", 0.5, math.log(2)),
        ([judgment("A"), judgment("B", "old")], "win", 1, 0),
        ([judgment("A"), judgment("A", "old")], "inconsistent", 0.5, math.log(2)),
        ([judgment("TIE"), judgment("TIE", "old")], "tie", 0.5, math.log(2)),
        ([judgment("A"), judgment("TIE", "old")], "inconsistent", 0.5, 0.5623351446),
        ([judgment("A"), judgment("unreadable", "old")], "unreadable", None, None),
        ([judgment("unreadable"), judgment("failed", "old")], "failed", None, None),
    ],
)
def test_an_outcome(
    verdicts: list[Any], says: str, preference: float | None, uncertainty: float | None
) -> None:
    found = outcome_of(PAIR, "j", verdicts)
    assert found.says == says
    if preference is None or uncertainty is None:
        assert math.isnan(found.preference)
        assert not found.counts
    else:
        assert found.preference == preference
        assert found.uncertainty == pytest.approx(uncertainty)


def test_what_counts_and_what_is_left_out() -> None:
    pairs = [Pair(str(k), "new", "old", "a" * k, "aa") for k in range(7)]
    verdicts = [
        [judgment("A"), judgment("B", "old")],
        [judgment("A"), judgment("B", "old")],
        [judgment("B"), judgment("A", "old")],
        [judgment("A"), judgment("A", "old")],
        [judgment("A"), judgment("TIE", "old")],
        [judgment("unreadable"), judgment("A", "old")],
        [judgment("failed"), judgment("A", "old")],
    ]
    outcomes = [outcome_of(p, "j", v) for p, v in zip(pairs, verdicts, strict=True)]
    (result,) = results_of(outcomes)
    counts = result.counts
    assert (counts["win"], counts["tie"], counts["loss"], result.n) == (2, 2, 1, 5)
    assert (counts["inconsistent"], counts["unreadable"], counts["failed"]) == (2, 1, 1)
    assert result.rate.value == pytest.approx(3 / 5)
    (result,) = results_of([abstaining(one, 0.6) for one in outcomes])
    assert (result.n, result.counts["abstained"]) == (4, 1)  # 0.69 is above, 0.56 is not
    assert result.rate.value == pytest.approx(2.5 / 4)


def test_two_judges_agree_on_pairs_that_both_judged() -> None:
    pairs = [Pair(str(k), "new", "old", "a", "b") for k in range(5)]
    said = {"one": "AABBA", "two": "AAAB?"}
    outcomes = [
        outcome_of(pair, judge, [judgment("unreadable" if v == "?" else v)])
        for judge, verdicts in said.items()
        for pair, v in zip(pairs, verdicts, strict=True)
    ]
    (agreement,) = agreements_of(outcomes)
    assert (agreement.judges, agreement.pairs) == (("one", "two"), 4)
    assert agreement.kappa == pytest.approx(0.5)  # as in test_statistics
    (mean,) = means_of(outcomes)
    assert (mean.model, mean.judges, mean.n) == ("new", 2, 4)
    # "new" stands first: 1, 1, 0, 0 by the one and 1, 1, 1, 0 by the other.
    assert mean.rate.value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert means_of([one for one in outcomes if one.judge == "one"]) == []
