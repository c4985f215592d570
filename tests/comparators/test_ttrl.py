from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import load_tokenizer

from cme_reward import InputError, SpanTable
from cme_reward.comparators import TTRL, EvolRL, final_answer
from cme_reward.comparators.evol_rl import shared_trigrams

TOKENIZER = load_tokenizer("byte-level")
TABLE = SpanTable(TOKENIZER)


def encoded(texts: list[str]) -> list[list[int]]:
    return [[*TABLE.encode(text)[0].tolist(), TOKENIZER.eos_token_id] for text in texts]


def test_by_hand() -> None:
    r"""Answers to p: 5, 6, 5, none -> 5 wins: 1, 0, 1, 0. Answers to q: 7, 8 -> 7 came first."""
    texts = ["It is 5", "6!", r"so \boxed{5.0}", " ", "7", "8"]
    batch = TTRL(TOKENIZER)(["p"] * 4 + ["q"] * 2, encoded(texts))
    assert batch.sequence_rewards.tolist() == [1, 0, 1, 0, 1, 0]
    assert batch.metrics["majority_share"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert batch.metrics["answered"] == pytest.approx(5 / 6)
    assert batch.metrics["sequence_reward_mean"] == pytest.approx(0.5)


def naive(prompts: list[str], answers: list[str | None]) -> list[float]:
    rewards = []
    for prompt, answer in zip(prompts, answers, strict=True):
        votes = [a for p, a in zip(prompts, answers, strict=True) if p == prompt and a is not None]
        best = max((votes.count(a) for a in votes), default=0)
        winner = next((a for a in votes if votes.count(a) == best), None)
        rewards.append(float(answer is not None and answer == winner))
    return rewards


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from(["1", "2", "3", ""])), max_size=9))
def test_equals_loops_in_any_order(rows: list[tuple[str, str]]) -> None:
    prompts, texts = [p for p, _ in rows], [text for _, text in rows]
    batch = TTRL(TOKENIZER)(prompts, encoded(texts))
    assert batch.sequence_rewards.tolist() == naive(prompts, [text or None for text in texts])


def test_prompts_as_messages_are_grouped_by_what_they_say() -> None:
    one, same, other = ([{"role": "user", "content": text}] for text in ("a", "a", "b"))
    batch = TTRL(TOKENIZER)([one, other, same], encoded(["1", "2", "1"]))
    assert batch.sequence_rewards.tolist() == [1, 1, 1]
    assert batch.metrics["majority_share"] == 1


def test_the_answer_is_the_users_to_extract() -> None:
    batch = TTRL(TOKENIZER, answer=len)(["p"] * 3, encoded(["four", "5", "nine"]))
    assert batch.sequence_rewards.tolist() == [1, 0, 1]


def test_only_sampled_text_is_read() -> None:
    ids = encoded(["1", "1", "2"])
    masks = [[1] * len(row) for row in ids]
    masks[0] = [0] * len(ids[0])
    batch = TTRL(TOKENIZER)(["p"] * 3, ids, masks)
    assert batch.sequence_rewards.tolist() == [0, 1, 0]
    assert batch.metrics["answered"] == pytest.approx(2 / 3)


def test_without_any_answer_nobody_is_rewarded() -> None:
    batch = TTRL(TOKENIZER)(["p", "p"], [[], []])
    assert batch.sequence_rewards.tolist() == [0, 0]
    assert batch.metrics["majority_share"] == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 5.", "5"),
        ("5 apples and 12 pears", "12"),
        ("1,234,567 people", "1234567"),
        ("-3.50", "-3.5"),
        ("+7", "7"),
        ("100", "100"),
        ("-0.0", "0"),
        (r"\boxed{1000.0} or 7", "1000"),
        (r"\boxed{1} then \boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{ a   b }", "a b"),
        (r"\boxed{}", None),
        ("red  and\nblue", "red and blue"),
        ("x2 y3z", "x2 y3z"),
        ("", None),
        (" \n", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_final_answer_takes_any_text() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(r"\boxed{}{} 0123.,-+ab") for _ in range(rng.randrange(40)))
        answer: Any = final_answer(text)
        assert answer is None or (answer and answer == " ".join(answer.split()))


def test_majority_and_novelty_by_hand() -> None:
    """Answers to p: 5, 5, 5, 6, 7 and none; similarities are what the table says."""
    texts = ["a 5", "b 5", "c 5", "6", "7", ""]
    alike = np.full((5, 5), 0.2)
    alike[0, 1] = alike[1, 0] = 0.8
    alike[3, 0] = alike[0, 3] = 0.4

    def table(given: Sequence[str]) -> np.ndarray:
        assert list(given) == texts[:5]  # an empty text has no answer, and is compared with nobody
        return alike

    batch = EvolRL(TOKENIZER, similarity=table)(["p"] * 6, encoded(texts))
    # The majority: means 0.5, 0.5, 0.2 and maxima 0.8, 0.8, 0.2, novelties 0.35, 0.35, 0.8.
    # The others: means 0.2 both, maxima 0.4 and 0.2, novelties 0.7 and 0.8.
    assert batch.sequence_rewards.tolist() == pytest.approx([0.5, 0.5, 1, -1, -0.5, -1])
    assert batch.metrics["majority_share"] == 0.5


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], []),
        (["5"], [1]),
        (["5", "5"], [0.75, 0.75]),
        (["5", "6"], [1, -0.5]),
        (["", ""], [-1, -1]),
    ],
)
def test_novelty_where_there_is_none(texts: list[str], expected: list[float]) -> None:
    batch = EvolRL(TOKENIZER)(["p"] * len(texts), encoded(texts))
    assert batch.sequence_rewards.tolist() == expected


def test_trigrams_by_hand() -> None:
    # abc, bcd against abc, bcx: one of two shared. A short text is one piece.
    found = shared_trigrams(["abcd", "abcx", "ab", "ab", "", ""])
    assert found[0].tolist() == pytest.approx([1, 0.5, 0, 0, 0, 0])
    assert found[2].tolist() == pytest.approx([0, 0, 1, 1, 0, 0])
    assert found[4].tolist() == pytest.approx([0, 0, 0, 0, 1, 1])


def test_a_similarity_of_the_wrong_shape_is_an_error() -> None:
    def wrong(texts: Sequence[str]) -> np.ndarray:
        return np.ones(len(texts))

    with pytest.raises(InputError, match=r"expected \(2, 2\) finite ones from 0 to 1"):
        EvolRL(TOKENIZER, similarity=wrong)(["p"] * 2, encoded(["1", "2"]))
