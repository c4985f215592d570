"""What the adapter leans on in TRL, so that a new TRL breaks a test and not a run."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl_tiny as tiny
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError
from cme_reward.trl.checks import DETACHED_LOSSES, TOKEN_LOSSES, check_settings

TESTED = "1.16.0"


def test_the_tested_version() -> None:
    """Another one: read the notes of docs/trl.md against it, then change this line."""
    assert trl.__version__ == TESTED
    pins = Path(__file__).parent.parent.parent / "constraints.txt"
    assert f"trl=={TESTED}" in pins.read_text().splitlines()


def test_signatures() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(GRPOTrainer.__init__)[:4] == ["self", "model", "reward_funcs", "args"]
    assert names(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert names(GRPOTrainer._get_per_token_logps_and_entropies)[:6] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ]
    assert "compute_entropy" in names(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]


def test_settings_that_are_checked_exist() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert defaults["loss_type"] == "dapo"
    assert defaults["scale_rewards"] == "group"
    assert defaults["importance_sampling_level"] == "token"
    assert defaults["multi_objective_aggregation"] == "sum_then_normalize"
    assert defaults["off_policy_mask_threshold"] is None
    assert defaults["beta"] == 0.0
    # A fused loss would compute its own advantages' product; 1.16 has only Liger's layer kernels.
    assert "use_liger_loss" not in defaults


def test_no_setting_is_new() -> None:
    """A new setting may change what becomes of an advantage: read it, then change this number."""
    of_grpo = set(inspect.get_annotations(GRPOConfig))
    assert len(of_grpo) == 79, sorted(of_grpo)


def test_what_a_reward_function_and_the_loss_are_given(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def reward(**kwargs: Any) -> list[float]:
        given.append(kwargs)
        return [float(k) for k in range(len(kwargs["prompts"]))]

    stock = GRPOTrainer(
        tiny.policy(),
        reward,  # type: ignore[arg-type]
        tiny.arguments(tmp_path),
        Dataset.from_list([row | {"hint": "h"} for row in tiny.CHAT]),
        processing_class=tiny.tokenizer(),
    )
    received = tiny.train(stock)
    (call,) = given
    assert set(call) == {
        *("prompts", "completions", "completion_ids", "hint"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    # Rollouts of a prompt lie one after the other; ids are unpadded lists that end at an EOS.
    assert [call["prompts"][b // 4 * 4] for b in range(8)] == call["prompts"]
    assert all(type(i) is int for row in call["completion_ids"] for i in row)
    assert all(tiny.EOS not in row[:-1] for row in call["completion_ids"])
    assert set(received[0]) == {
        *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
        *("advantages", "num_items_in_batch"),
    }
    assert received[0]["advantages"].shape == (4,)
    shown = [row for inputs in received for row in inputs["completion_ids"].tolist()]
    for row in call["completion_ids"]:
        assert any(padded[: len(row)] == row for padded in shown)
    metrics = stock.state.log_history[0]
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/reward/mean"):
        assert name in metrics


def test_batches_are_split_and_shuffled_with_their_tokens() -> None:
    batch: dict[str, Any] = {
        "ids": torch.arange(8).view(4, 2),
        "advantages": torch.arange(8.0).view(4, 2),
    }
    shuffled: Any = shuffle_sequence_dict(batch)
    chunks: Any = split_tensor_dict(shuffled, 2)
    assert [chunk["advantages"].shape for chunk in chunks] == [(2, 2), (2, 2)]
    assert all(chunk["ids"].tolist() == chunk["advantages"].tolist() for chunk in chunks)


def token_credit(made: Any, loss_type: str, level: str) -> bool:
    """Whether d loss / d logp[i, t] is A[i, t] times something of the response alone."""
    made.loss_type, made.importance_sampling_level = loss_type, level
    made.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    logps_BT = (-torch.rand(3, 5)).requires_grad_()
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logps_BT, torch.rand(3, 5), None)
    advantages_BT = torch.randn(3, 5)
    made._compute_loss(
        made.model,
        {
            "prompt_ids": torch.ones(3, 2, dtype=torch.long),
            "prompt_mask": torch.ones(3, 2, dtype=torch.long),
            "completion_ids": torch.ones(3, 5, dtype=torch.long),
            "completion_mask": torch.ones(3, 5, dtype=torch.long),
            "advantages": advantages_BT,
            "num_items_in_batch": torch.tensor(15),
        },
    ).backward()
    assert logps_BT.grad is not None
    share_BT = logps_BT.grad / advantages_BT
    return bool((share_BT < 0).all()) and torch.allclose(share_BT, share_BT[:, :1].expand(3, 5))


def test_which_losses_keep_the_credit_of_a_token(tmp_path: Path) -> None:
    """The settings that are refused are those under which the gradient loses it; measured."""
    made = tiny.trainer(tmp_path)
    in_source = re.findall(
        r'self\.loss_type (?:==|in) (\[[^\]]*\]|"\w+")',
        inspect.getsource(GRPOTrainer._compute_loss),
    )
    losses = set(re.findall(r'"(\w+)"', " ".join(in_source)))
    assert losses == set(TOKEN_LOSSES)
    for loss_type in sorted(losses):
        assert token_credit(made, loss_type, "token"), loss_type
        kept = token_credit(made, loss_type, "sequence")
        assert kept == (loss_type in DETACHED_LOSSES), loss_type
    for level in ("token", "sequence"):
        for loss_type in losses:
            args = tiny.arguments(tmp_path, loss_type=loss_type, importance_sampling_level=level)
            if level == "token" or loss_type in DETACHED_LOSSES:
                check_settings(args, CMEConfig(), others=False)
            else:
                with pytest.raises(ConfigError, match="credit per token is lost"):
                    check_settings(args, CMEConfig(), others=False)


def test_the_off_policy_mask_would_take_a_responses_negative_tokens() -> None:
    """One response far off policy keeps its positive tokens, hence the setting is refused."""
    mask_BT = GRPOTrainer.get_off_policy_mask(
        advantages=torch.tensor([[1.0, -1.0, 2.0]]),
        per_token_logps=torch.full((1, 3), -9.0),
        sampling_per_token_logps=torch.zeros(1, 3),
        mask=torch.ones(1, 3),
        off_policy_threshold=0.1,
    )
    assert mask_BT.tolist() == [[1.0, 0.0, 1.0]]
