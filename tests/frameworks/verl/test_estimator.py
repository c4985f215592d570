"""`cme_grpo`, called as veRL calls it."""

# pyright: reportMissingImports=false
from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

import cme_reward.verl  # noqa: F401  (registers the estimator)
from cme_reward import ConfigError, InputError, VerifierError
from cme_reward.verl.channel import write_rewards
from cme_reward.verl.settings import SUMMING


def advantages(
    rewards: Any, mask: Any, groups: list[str], response_mask: Any = None, **algorithm: Any
) -> torch.Tensor:
    """Through veRL's own function."""
    written = torch.from_numpy(np.stack([write_rewards(r, m) for r, m in zip(rewards, mask)]))  # noqa: B905
    sampled = torch.ones_like(written) if response_mask is None else torch.tensor(response_mask)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": written, "response_mask": sampled.long()},
        non_tensors={"uid": np.array(groups, dtype=object)},
    )
    keys = [f"{group}_{i}_0" for i, group in enumerate(groups)]
    config = OmegaConf.create({"adv_estimator": "cme_grpo", **algorithm})
    out = compute_advantage_for_multi_trajectories(data, keys, "cme_grpo", config=config)
    assert torch.equal(out.batch["advantages"], out.batch["returns"])
    return out.batch["advantages"]


def test_by_hand() -> None:
    # Position 0: rewards -1 and -3, mean -2, sample deviation sqrt(2); eps 0.1:
    # (-1 + 2) / (1.41421 + 0.1) = 0.66041. Position 1: one of the two is masked, so nobody counts.
    # Position 2: 0 and -1, both scored: mean -0.5, deviation 0.70711: 0.5 / 0.80711 = 0.61950.
    got = advantages(
        [[-1.0, -5.0, 0.0], [-3.0, 0.0, -1.0]],
        [[True, True, True], [True, False, True]],
        ["a", "a"],
    )
    expected = torch.tensor([[0.66041, 0.0, 0.61950], [-0.66041, 0.0, -0.61950]])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_an_honest_zero_counts_and_a_masked_one_does_not() -> None:
    """The same numbers, told apart by the mask alone."""
    rewards = [[0.0, -1.0], [-2.0, -1.5], [-4.0, -2.0]]
    counted = advantages(rewards, [[True, True]] * 3, ["a"] * 3)
    # Mean -2, deviation 2: (0 + 2) / 2.1.
    assert counted[0, 0].item() == pytest.approx(2 / 2.1, abs=1e-6)
    masked = advantages(rewards, [[False, True], [True, True], [True, True]], ["a"] * 3)
    assert masked[0, 0] == 0
    # Without it mean -3, deviation sqrt(2).
    assert masked[1, 0].item() == pytest.approx(1 / (2**0.5 + 0.1), abs=1e-6)


def test_positive_rewards_of_the_policy_baseline() -> None:
    got = advantages([[0.5, 0.0], [1.5, -0.5]], [[True, True]] * 2, ["a", "a"])
    assert got[1, 0].item() == pytest.approx(0.5 / (0.5**0.5 + 0.1), abs=1e-6)
    assert got[0, 1].item() == pytest.approx(0.25 / (0.125**0.5 + 0.1), abs=1e-6)


def test_tool_tokens_and_padding_rows_take_no_part() -> None:
    rewards = [[-1.0, -9.0, -2.0], [-2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    mask = [[True, True, True], [True, False, True], [False] * 3]
    got = advantages(rewards, mask, ["a", "a", "pad1"], [[1, 0, 1], [1, 0, 1], [0, 0, 0]])
    assert got[:, 1].tolist() == [0, 0, 0]
    assert got[2].tolist() == [0, 0, 0]
    assert (got[:2, [0, 2]] != 0).all()


def test_options() -> None:
    rewards, mask = [[-1.0, -2.0], [-3.0, -1.0]], [[True, True]] * 2
    centred = advantages(rewards, mask, ["a", "a"], cme={"scale": "none"})
    assert centred.tolist() == [[1.0, -0.5], [-1.0, 0.5]]
    wide = advantages(rewards, mask, ["a", "a"], cme={"eps": 1.0})
    assert wide[0, 0].item() == pytest.approx(1 / (2**0.5 + 1), abs=1e-6)
    summed = advantages(rewards, mask, ["a", "a"], cme={"level": "sequence", "scale": "none"})
    assert summed.tolist() == [[0.5, 0.5], [-0.5, -0.5]]  # -3 and -4
    with pytest.raises(ConfigError, match=r"algorithm\.cme\.epsilon; did you mean 'eps'"):
        advantages(rewards, mask, ["a", "a"], cme={"epsilon": 1.0})


def test_a_scalar_reward_is_refused() -> None:
    """What veRL makes of a number: the last token has it, all others 0."""
    with pytest.raises(InputError, match="none of 2 responses has a reward on more than one token"):
        advantages([[0, 0, -1.0], [0, 0, -2.0]], [[False, False, True]] * 2, ["a", "a"])
    # One token per response is all that can be rewarded in responses of one token.
    got = advantages([[-1.0], [-2.0]], [[True]] * 2, ["a", "a"])
    assert (got != 0).all()


def test_kl_in_the_reward_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"use_kl_loss=True"):
        advantages([[-1.0, 0]], [[True, True]], ["a"], use_kl_in_reward=True)


def test_missing_rewards_stop_the_run() -> None:
    with pytest.raises(VerifierError, match="no step is trained without them"):
        advantages([[float("nan"), 0.0]], [[True, True]], ["a"])


@pytest.mark.parametrize("name", sorted(core_algos.ADV_ESTIMATOR_REGISTRY))
def test_which_of_verls_estimators_lose_the_token(name: str) -> None:
    """Is the advantage of a token independent of which token earned the reward?"""
    if name == "cme_grpo":
        return
    torch.manual_seed(0)
    B, T = 4, 5
    rewards = torch.randn(B, T)

    def call(rewards_BT: torch.Tensor) -> torch.Tensor:
        function = core_algos.get_adv_estimator_fn(name)
        available = {
            "token_level_rewards": rewards_BT.clone(),
            "response_mask": torch.ones(B, T),
            "index": np.array(["a", "a", "b", "b"], dtype=object),
            "config": OmegaConf.create({"gamma": 1.0, "norm_adv_by_std_in_grpo": True}),
            "values": torch.zeros(B, T),
            "gamma": torch.tensor(1.0),
            "lam": torch.tensor(1.0),
            "reward_baselines": torch.zeros(B),
            "old_log_probs": torch.full((B, T), -1.0),
            "sum_pi_squared": torch.full((B, T), 0.5),
        }
        names = inspect.signature(function).parameters
        return function(**{k: v for k, v in available.items() if k in names})[0]

    moved = rewards.roll(1, dims=1)  # the same sums, earned by other tokens
    loses = torch.allclose(call(rewards), call(moved), atol=1e-5)
    assert loses == (name in SUMMING)
