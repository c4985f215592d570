from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

from cme_reward import ConfigError, CrossModelEntropy, InputError, group_advantages

HI = [{"role": "user", "content": "hi"}]


def naive(rewards, mask, groups, scale: str, eps: float) -> list[list[float]]:
    """Loop over rows and positions, after the formula."""
    advantages = []
    for i, row in enumerate(rewards):
        advantages.append([])
        for t, reward in enumerate(row):
            peers = [
                rewards[j][t] for j in range(len(rewards)) if groups[j] == groups[i] and mask[j][t]
            ]
            if not mask[i][t] or len(peers) < 2:
                advantages[i].append(0.0)
                continue
            mean = math.fsum(peers) / len(peers)
            var = math.fsum((peer - mean) ** 2 for peer in peers) / (len(peers) - 1)
            divisor = math.sqrt(var) + eps if scale == "std" else 1.0
            advantages[i].append((reward - mean) / divisor)
    return advantages


def test_by_hand() -> None:
    rewards = torch.tensor([[-1.0, -2.0, -5.0], [-3.0, -2.0, -7.0], [-9.0, -4.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    advantages = group_advantages(rewards, mask, ["a", "a", "b"], eps=0.0)
    # Group a, position 0: mean -2, deviations 1 and -1, sample std sqrt(2): +-0.7071.
    # Position 1: both -2, so 0. Position 2: one rollout unmasked, so 0. Group b: one rollout, 0.
    assert advantages[:, 0].tolist() == pytest.approx([0.70710678, -0.70710678, 0])
    assert advantages[:, 1:].tolist() == [[0, 0], [0, 0], [0, 0]]
    # eps is in nats: 1 / (1.41421 + 0.1) = 0.66041
    default = group_advantages(rewards, mask, ["a", "a", "b"])
    assert default[0, 0].item() == pytest.approx(0.66041, abs=1e-5)
    plain = group_advantages(rewards, mask, ["a", "a", "b"], scale="none")
    assert plain[:, 0].tolist() == [1, -1, 0]


@st.composite
def batches(draw: st.DrawFn):
    n_rows, n_tokens = draw(st.integers(1, 7)), draw(st.integers(0, 4))

    def table(values: st.SearchStrategy) -> list[list]:
        row = st.lists(values, min_size=n_tokens, max_size=n_tokens)
        return draw(st.lists(row, min_size=n_rows, max_size=n_rows))

    groups = draw(st.lists(st.sampled_from("xyz"), min_size=n_rows, max_size=n_rows))
    return table(st.floats(-20, 5)), table(st.booleans()), groups


@given(batches(), st.sampled_from(["std", "none"]), st.sampled_from([1e-4, 0.1, 1.0]))
def test_equals_the_loop(batch, scale: Any, eps: float) -> None:
    rewards, mask, groups = batch
    shape = len(rewards), len(rewards[0])
    advantages = group_advantages(
        torch.tensor(rewards, dtype=torch.float64).reshape(shape),
        torch.tensor(mask, dtype=torch.bool).reshape(shape),
        groups,
        scale=scale,
        eps=eps,
    )
    expected = torch.tensor(naive(rewards, mask, groups, scale, eps), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected.reshape(shape), rtol=1e-9, atol=1e-9)


def test_the_order_of_rows_and_the_names_of_groups_do_not_matter() -> None:
    rewards, mask = torch.randn(6, 5), torch.rand(6, 5) > 0.3
    groups = torch.tensor([7, 7, -1, -1, -1, 7])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    advantages = group_advantages(rewards, mask, groups)
    shuffled = group_advantages(rewards[order], mask[order], groups[order])
    torch.testing.assert_close(shuffled, advantages[order])
    named = group_advantages(rewards, mask, [("uid", g.item()) for g in groups])
    torch.testing.assert_close(named, advantages)


def test_values_under_the_mask_are_not_read() -> None:
    rewards = torch.tensor([[-1.0, math.nan], [-2.0, math.inf]])
    advantages = group_advantages(rewards, torch.tensor([[1, 0], [1, 0]]), [0, 0])
    assert advantages[:, 1].tolist() == [0, 0]
    assert torch.isfinite(advantages).all()


def test_rollouts_that_agree_get_nothing_even_without_eps() -> None:
    rewards = torch.full((4, 1), -1 / 3)
    assert group_advantages(rewards, torch.ones(4, 1), [0] * 4, eps=0.0).tolist() == [[0]] * 4


def test_keeps_dtype_and_takes_an_empty_batch() -> None:
    assert group_advantages(torch.zeros(0, 3), torch.zeros(0, 3), []).shape == (0, 3)
    half = torch.randn(2, 2, dtype=torch.bfloat16)
    assert group_advantages(half, torch.ones(2, 2), [0, 0]).dtype == torch.bfloat16
    assert not group_advantages(torch.randn(3, 2), torch.zeros(3, 2), [0, 0, 0]).any()


@pytest.mark.parametrize(
    "groups",
    [
        [torch.tensor(7), torch.tensor(8), torch.tensor(7)],
        list(torch.tensor([7, 8, 7])),
        [np.int64(7), np.float32(8), 7],
        [np.array(7), np.array(8), torch.tensor(7)],
        np.array([7, 8, 7]),
        ["7", "8", np.str_("7")],
        [("a", torch.tensor(1)), ("b", torch.tensor(1)), ("a", torch.tensor(1))],
        [HI, [*HI, *HI], copy.deepcopy(HI)],
        [tuple(HI), "hi", [dict(reversed(HI[0].items()))]],
        [HI, json.dumps(HI), HI],
    ],
    ids=str,
)
def test_groups_go_by_value(groups: Any) -> None:
    rewards = torch.tensor([[-1.0], [-5.0], [-3.0]])
    advantages = group_advantages(rewards, torch.ones(3, 1), groups, scale="none")
    assert advantages.tolist() == [[1], [0], [-1]]


def test_prompts_as_messages_are_groups_of_a_batch() -> None:
    tokenizer = load_tokenizer("bytes")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer)
    prompts = [HI, HI, [{"role": "user", "content": "ho"}]]
    batch = cme(prompts, [cme.table.encode(text)[0] for text in "abc"])
    assert torch.equal(batch.advantages(prompts), batch.advantages([0, 0, 1]))
    assert batch.advantages(prompts)[0] != 0


def test_refuses() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(
        ConfigError, match="scale='max' is unknown; expected one of std, batch, none"
    ):
        group_advantages(ones, ones, [0, 0], scale="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"eps=-0\.1"):
        group_advantages(ones, ones, [0, 0], eps=-0.1)
    for wrong in (torch.zeros(2), np.zeros(2), {1: 2}, [3]):
        with pytest.raises(InputError, match=r"group .* cannot be compared with others; expected"):
            group_advantages(torch.zeros(2, 1), torch.ones(2, 1), [0, wrong])
    with pytest.raises(InputError, match=r"rewards \(2, 3\), mask \(2, 2\) and 2 groups"):
        group_advantages(ones, torch.ones(2, 2), [0, 0])
    with pytest.raises(InputError, match="3 groups"):
        group_advantages(ones, ones, [0, 0, 1])
    with pytest.raises(InputError, match=r"rewards\[1, 2\] is nan and unmasked"):
        group_advantages(torch.tensor([[0.0] * 3, [0, 0, math.nan]]), ones, [0, 0])
    with pytest.raises(InputError, match="expected \\[B\\]"):
        group_advantages(ones, ones, torch.zeros(2, 1))
