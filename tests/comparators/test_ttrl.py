from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import load_tokenizer

from cme_reward import SpanTable
from cme_reward.comparators import TTRL, final_answer

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
