"""The reward of format and length: by hand, and against loops."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import load_tokenizer

from cme_reward import ConfigError, SpanTable
from cme_reward.comparators import FormatLength, load_reward

TOKENIZER = load_tokenizer("byte-level")
TABLE = SpanTable(TOKENIZER)


def test_by_hand() -> None:
    r"""Longest 8, best 2 (a quarter): lengths 1, 2, 5, 8, 11 have f = 3/4, 1, 1/2, -1, -3 1/2."""
    at = TABLE.encode("a")[0].tolist()
    reward = FormatLength(TOKENIZER, format="a", longest=8, best=0.25)
    ids = [at * n for n in (1, 2, 5, 8, 11)]
    batch = reward(["p"] * 5, ids)
    assert batch.sequence_rewards.tolist() == [1.75, 2.0, 1.5, 0.0, -2.5]
    assert batch.metrics["right_format"] == 1
    none = FormatLength(TOKENIZER, format="b", longest=8, best=0.25)(["p"] * 6, [*ids, []])
    assert none.sequence_rewards.tolist() == [0, 0, 0, -1, -3.5, 0]
    assert none.metrics["right_format"] == 0
    assert batch.token_rewards[:, -1].tolist() == [0, 0, 0, 0, -2.5]
    assert reward([], []).metrics["right_format"] == 0


def test_the_default_format_is_a_box() -> None:
    texts = ["\\boxed{4}", "so\n\\boxed{\n4}.", "\\boxed{}", "4", "boxed{4}"]
    ids = [TABLE.encode(text)[0] for text in texts]
    batch = load_reward("format-length", TOKENIZER)(["p"] * 5, ids)
    assert (batch.sequence_rewards >= 1).tolist() == [True, True, False, False, False]
    assert batch.metrics["right_format"] == pytest.approx(0.4)


def test_only_sampled_tokens_count() -> None:
    end = TOKENIZER.eos_token_id
    a, b = (TABLE.encode(text)[0].tolist() for text in "ab")
    reward = FormatLength(TOKENIZER, format=lambda text: text == "aa", longest=8, best=0.5)
    batch = reward(["p"], [[*a, *b, *a, end, end]], [[1, 0, 1, 1, 0]])
    assert batch.sequence_rewards.tolist() == pytest.approx([1 + 1 - (1 - 3 / 4) ** 2])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text("ab", max_size=30), max_size=5),
    st.integers(1, 40),
    st.floats(0.01, 0.99),
)
def test_equals_loops(texts: list[str], longest: int, best: float) -> None:
    ids = [TABLE.encode(text)[0].tolist() for text in texts]
    batch = FormatLength(TOKENIZER, format="ab", longest=longest, best=best)(["p"] * len(ids), ids)
    for text, row, found in zip(texts, ids, batch.sequence_rewards.tolist(), strict=True):
        x = len(row) / longest
        up = x <= best
        share = 1 - (1 - x / best) ** 2 if up else 1 - 2 * ((x - best) / (1 - best)) ** 2
        assert found == pytest.approx(1 + share if "ab" in text else min(0, share), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "("}, r"format='\(' is no regular expression: missing \)"),
        ({"longest": 0}, "longest=0: expected the longest response in tokens"),
        ({"best": 1.0}, "best=1.0: expected a share of the longest length, between 0 and 1"),
        ({"per_token": True}, "per_token=True: format-length is a judgement of whole responses"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FormatLength(TOKENIZER, **options)
