"""RENT, EM-RL and INTUITOR, and what all comparators share."""

from __future__ import annotations

import asyncio
import math
import pickle
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

from cme_reward import CMEConfig, ConfigError, CrossModelEntropy, InputError
from cme_reward.comparators import (
    REWARDS,
    RLME,
    Comparator,
    PolicyStatistics,
    call_reward,
    load_reward,
    needed_statistics,
)

TOKENIZER = load_tokenizer("byte-level")
LOG_V = math.log(len(TOKENIZER))
OF_POLICY = ["rent", "em-rl-token", "em-rl-sequence", "intuitor"]

# Two responses to one prompt, three and two tokens; the middle one of the first was not sampled.
IDS = [[10, 11, 12], [13, 14]]
MASKS = [[1, 0, 1], [1, 1]]
STATISTICS = PolicyStatistics(
    logprobs=[[-0.5, -9.0, -1.5], [-2.0, -0.25]],
    entropies=[[1.0, 9.0, 2.0], [0.5, 0.0]],
    self_certainties=[[3.0, 9.0, 1.0], [4.0, 5.0]],
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rent", [-1.5, -0.25]),  # -(1 + 2) / 2; -(0.5 + 0) / 2
        ("em-rl-token", [-3.0, -0.5]),  # -(1 + 2); -(0.5 + 0)
        ("em-rl-sequence", [-2.0, -2.25]),  # -0.5 - 1.5; -2 - 0.25
        ("intuitor", [2.0, 4.5]),  # (3 + 1) / 2; (4 + 5) / 2
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    batch = load_reward(name, TOKENIZER)(["p", "p"], IDS, MASKS, policy_statistics=STATISTICS)
    assert batch.sequence_rewards.tolist() == pytest.approx(expected)
    assert batch.config.level == "sequence"
    # A scalar is where frameworks place one, and belongs to all sampled tokens.
    assert batch.token_rewards.tolist() == [
        pytest.approx([0, 0, expected[0]]),
        pytest.approx([0, expected[1], 0]),
    ]
    assert batch.mask.tolist() == [[True, False, True], [True, True, False]]
    assert batch.metrics["sequence_reward_mean"] == pytest.approx(sum(expected) / 2)


def test_advantages_are_grpos() -> None:
    """RENT -1.5 and -0.25: mean -0.875, std 0.883883; -0.625 / (0.883883 + 0.1) = -0.635238."""
    batch = load_reward("rent", TOKENIZER)(["p", "p"], IDS, MASKS, policy_statistics=STATISTICS)
    a = 0.625 / (0.883883 + 0.1)
    assert batch.advantages(["p", "p"]).tolist() == [
        pytest.approx([-a, 0, -a], abs=1e-5),
        pytest.approx([a, a, 0], abs=1e-5),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rent", [[-1.0, 0, -2.0], [-0.5, 0, 0]]),
        ("em-rl-token", [[-1.0, 0, -2.0], [-0.5, 0, 0]]),
        ("em-rl-sequence", [[-0.5, 0, -1.5], [-2.0, -0.25, 0]]),
        ("intuitor", [[3.0, 0, 1.0], [4.0, 5.0, 0]]),
    ],
)
def test_per_token(name: str, expected: list[list[float]]) -> None:
    """On request, each token its own part; the sequence reward stays what it is."""
    whole = load_reward(name, TOKENIZER)(["p", "p"], IDS, MASKS, policy_statistics=STATISTICS)
    batch = load_reward(name, TOKENIZER, per_token=True)(
        ["p", "p"], IDS, MASKS, policy_statistics=STATISTICS
    )
    assert batch.token_rewards.tolist() == expected
    assert batch.config.level == "token"
    assert batch.sequence_rewards.tolist() == whole.sequence_rewards.tolist()
    assert batch.metrics["token_reward_mean"] == pytest.approx(sum(map(sum, expected)) / 4)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_equals_loops(data: st.DataObject) -> None:
    numbers = st.floats(-5, 5, width=32)
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    ids = [data.draw(st.lists(st.integers(3, 200), min_size=n, max_size=n)) for n in lengths]
    masks = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    rows = [data.draw(st.lists(numbers, min_size=n, max_size=n)) for n in lengths]
    given_ = PolicyStatistics(rows, rows, rows)
    for name in OF_POLICY:
        batch = load_reward(name, TOKENIZER)(["p"] * len(ids), ids, masks, policy_statistics=given_)
        for b, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            own = [x for x, sampled in zip(row, mask, strict=True) if sampled]
            expected = {
                "rent": lambda own: -statistics.fmean(own),
                "em-rl-token": lambda own: -math.fsum(own),
                "em-rl-sequence": math.fsum,
                "intuitor": statistics.fmean,
            }[name](own or [{"em-rl-sequence": -LOG_V, "intuitor": 0.0}.get(name, LOG_V)])
            assert batch.sequence_rewards[b].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", OF_POLICY)
def test_an_empty_response_is_as_uncertain_as_a_guess(name: str) -> None:
    """Not 0, which is the best that RENT and EM-RL have; INTUITOR's worst is 0."""
    reward = load_reward(name, TOKENIZER)
    ids, masks = [[], [10, 11]], [[], [0, 0]]
    rows = [[], [1.0, 1.0]]
    batch = reward(["p", "p"], ids, masks, policy_statistics=PolicyStatistics(rows, rows, rows))
    expected = 0.0 if name == "intuitor" else -LOG_V
    assert batch.sequence_rewards.tolist() == pytest.approx([expected] * 2)
    assert not batch.mask.any()
    assert not batch.token_rewards.any()


def reward_by_name(name: str, **options: Any) -> Any:
    stub = TableVerifier(load_tokenizer("sentencepiece"))
    if name in ("self", "random"):
        return CrossModelEntropy(stub, TOKENIZER)
    return load_reward(name, TOKENIZER, verifier=stub, **options)


@pytest.mark.parametrize("name", REWARDS)
def test_all_are_called_alike(name: str) -> None:
    reward = reward_by_name(name)
    prompts: list[Any] = ["p", [{"role": "user", "content": "q"}]]
    needed = needed_statistics(reward)
    batch = call_reward(reward, prompts, IDS, MASKS, STATISTICS)
    tensors = call_reward(
        reward,
        prompts,
        torch.tensor([[10, 11, 12], [13, 14, 3]]),
        torch.tensor([[1, 0, 1], [1, 1, 0]]),
        PolicyStatistics(
            **{
                field: torch.tensor([[*row, 0.0][:3] for row in getattr(STATISTICS, field)])
                for field in needed
            }
        ),
    )
    torch.testing.assert_close(batch.sequence_rewards, tensors.sequence_rewards)
    torch.testing.assert_close(batch.token_rewards, tensors.token_rewards)
    assert batch.mask.tolist() == tensors.mask.tolist()
    again = asyncio.run(
        reward.score_async(prompts, IDS, MASKS, STATISTICS.logprobs)
        if isinstance(reward, CrossModelEntropy)
        else reward.score_async(prompts, IDS, MASKS, policy_statistics=STATISTICS)
    )
    assert again.sequence_rewards.tolist() == batch.sequence_rewards.tolist()
    assert len(batch.verifier_tokens) == len(batch.dropped_nats) == len(batch.token_logprobs) == 2
    assert batch.metrics["truncated"] == 0


@pytest.mark.parametrize("name", REWARDS)
def test_no_responses_give_an_empty_batch(name: str) -> None:
    batch = call_reward(reward_by_name(name), [], [], None, PolicyStatistics([], [], []))
    assert batch.token_rewards.shape == (0, 0)
    assert batch.sequence_rewards.shape == (0,)
    assert batch.advantages([]).shape == (0, 0)
    assert all(math.isfinite(value) for value in batch.metrics.values())


def test_the_frameworks_log_probs_are_enough_for_em_rl_sequence() -> None:
    reward = load_reward("em-rl-sequence", TOKENIZER)
    assert needed_statistics(reward) == ("logprobs",)
    batch = reward(["p", "p"], IDS, MASKS, STATISTICS.logprobs)
    assert batch.sequence_rewards.tolist() == pytest.approx([-2.0, -2.25])


def test_needed_statistics() -> None:
    stub = TableVerifier(TOKENIZER)
    assert needed_statistics(CrossModelEntropy(stub, TOKENIZER)) == ()
    with_baseline = CrossModelEntropy(stub, TOKENIZER, CMEConfig(baseline="policy"))
    assert needed_statistics(with_baseline) == ("logprobs",)
    batch = call_reward(with_baseline, ["p", "p"], IDS, MASKS, STATISTICS)
    plain = call_reward(CrossModelEntropy(stub, TOKENIZER), ["p", "p"], IDS, MASKS)
    difference = plain.token_rewards - batch.token_rewards
    assert difference[0, 0].item() == pytest.approx(-0.5)
    assert [needed_statistics(reward_by_name(name)) for name in ("rent", "intuitor", "ttrl")] == [
        ("entropies",),
        ("self_certainties",),
        (),
    ]


def test_they_pickle() -> None:
    for name in ("rent", "ttrl"):
        reward = load_reward(name, TOKENIZER)
        again = pickle.loads(pickle.dumps(reward))
        assert again.config == reward.config
        assert isinstance(again, Comparator)


@pytest.mark.parametrize("name", OF_POLICY)
def test_a_missing_statistic_is_named(name: str) -> None:
    (field,) = needed_statistics(load_reward(name, TOKENIZER))
    message = rf"{name} needs policy_statistics.{field}: .*policy_statistics\(model"
    with pytest.raises(InputError, match=message):
        load_reward(name, TOKENIZER)(["p", "p"], IDS, MASKS)


def test_arguments_are_checked() -> None:
    rent = load_reward("rent", TOKENIZER)
    with pytest.raises(InputError, match="got 1 prompts and 2 responses"):
        rent(["p"], IDS)
    with pytest.raises(InputError, match="id 99999 is not in the vocabulary"):
        rent(["p"], [[99999]])
    short = PolicyStatistics(entropies=[[1.0], [1.0, 2.0]])
    with pytest.raises(InputError, match=r"policy_statistics.entropies of response 0 has shape"):
        rent(["p", "p"], IDS, MASKS, policy_statistics=short)
    bad = PolicyStatistics(entropies=[[1.0, math.nan, 1.0], [1.0, math.nan]])
    with pytest.raises(InputError, match=r"entropies of response 1, token 1 is nan"):
        rent(["p", "p"], IDS, MASKS, policy_statistics=bad)  # the masked one is not read


@pytest.mark.parametrize("name", ["rent", "ttrl"])
def test_a_baseline_of_cme_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f'baseline="none" with {name}'):
        load_reward(name, TOKENIZER, CMEConfig(baseline="policy"))


def test_judgements_of_whole_responses_have_no_parts() -> None:
    stub = TableVerifier(TOKENIZER)
    with pytest.raises(ConfigError, match="ttrl is a judgement of whole responses"):
        load_reward("ttrl", TOKENIZER, per_token=True)
    with pytest.raises(ConfigError, match="rlme is a judgement of whole responses"):
        RLME(stub, TOKENIZER, per_token=True)


def test_repetition_and_length_are_of_the_sampled_tokens() -> None:
    ids = [[10, 11, 10, 11, 10, 11, 10, 11], [20, 21, 22, 23, 24, 25]]
    rows = [[1.0] * 8, [2.0] * 6]
    batch = load_reward("rent", TOKENIZER)(
        ["p", "p"], ids, policy_statistics=PolicyStatistics(entropies=rows)
    )
    assert batch.metrics["repetition"] == pytest.approx((3 / 5) / 2)  # 3 of 5 4-grams; none
    assert batch.metrics["length_correlation"] == pytest.approx(1.0)
    assert np.isfinite(list(batch.metrics.values())).all()


@pytest.mark.parametrize("name", OF_POLICY)
def test_what_follows_the_first_end_and_what_is_under_mask_0_is_padding(name: str) -> None:
    """Two tokens and the end, then pads of 9 nats: with no mask, and as -100 under mask 0."""
    end = TOKENIZER.eos_token_id
    reward = load_reward(name, TOKENIZER)

    def scored(ids: list[int], extra: int, masks: list[Any] | None) -> Any:
        rows = [[[0.5, 1.0, 2.0] + [9.0] * extra]] * 3
        return reward(["p"], [ids], masks, policy_statistics=PolicyStatistics(*rows))

    alone = scored([10, 11, end], 0, None)
    padded = scored([10, 11, end, end, end, end, end, end], 5, None)
    masked = scored([10, 11, end, -100, 10**6], 2, [[1, 1, 1, 0, 0]])
    for batch in (padded, masked):
        assert batch.sequence_rewards.tolist() == alone.sequence_rewards.tolist()
        assert batch.mask.sum() == 3
        assert batch.token_rewards[0, 2] == alone.sequence_rewards[0]
        assert batch.metrics["repetition"] == 0
    other = load_reward(name, TOKENIZER, eos_token_ids=[0])  # <|endoftext|>
    ids = [10, 11, 0, 0]
    batch = other(["p"], [ids], policy_statistics=PolicyStatistics(*[[[0.5, 1.0, 2.0, 9.0]]] * 3))
    assert batch.sequence_rewards.tolist() == alone.sequence_rewards.tolist()
