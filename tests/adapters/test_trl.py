"""The TRL adapter, through real trainings of a tiny policy on the CPU."""

from __future__ import annotations

import math
import pickle
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl_tiny as tiny
from datasets import Dataset
from trl.trainer.grpo_trainer import GRPOTrainer

import cme_reward.trl
from cme_reward import CMEConfig, ConfigError, CrossModelEntropy, InputError
from cme_reward.trl import CMEGRPOTrainer, RewardFunction, cme_reward_func

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SEQUENCE = CMEConfig(level="sequence")
FOUR = "What is 2 + 3?", "Tom has 4 pens and buys 1.", "Say hello.", "Why?"


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def first_id(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Not applicable to completions of which nothing but the end was sampled, nor to long ones."""
    return [float(ids[0]) if 1 < len(ids) < 12 else None for ids in completion_ids]


def scalar_advantages(values: list[float], *, scale: bool) -> list[float]:
    """TRL's advantage of a scalar reward: NaN is out of the group and gets 0."""
    there = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(there) if there else 0.0
    std = statistics.stdev(there) if len(there) > 1 else math.nan
    advantages = [(value - mean) / (std + 1e-4 if scale else 1.0) for value in values]
    return [0.0 if math.isnan(advantage) else advantage for advantage in advantages]


def close(rows: list[dict[str, Any]], expected: list[list[float]]) -> None:
    assert tiny.worst_error(rows, expected) <= 1e-5
    assert max(abs(value) for row in expected for value in row) > 0.1  # not all zero


@pytest.mark.parametrize(
    "config",
    [
        CMEConfig(),
        CMEConfig(scale="none"),
        CMEConfig(eps=1e-2),
        CMEConfig(credit="return"),
        CMEConfig(credit="return", gamma=0.7, scale="batch"),
        SEQUENCE,
    ],
    ids=["token", "unscaled", "eps", "return", "return-discounted", "sequence"],
)
def test_advantages_in_the_loss_are_recomputed_from_the_ids(
    config: CMEConfig, tmp_path: Path
) -> None:
    scale = {"std": "group", "batch": "batch", "none": "none"}[config.scale]
    made = tiny.trainer(tmp_path, config, max_steps=2, scale_rewards=scale)
    received = tiny.train(made)
    assert len(received) == 4  # two steps of two micro-batches
    for step in (received[:2], received[2:]):
        rows = tiny.rows_of(step)
        assert len(rows) == 8
        assert {row["ids"][-1] == tiny.EOS for row in rows} == {True, False}
        close(rows, tiny.expected_advantages(rows, config))


def test_prompts_may_be_plain_strings(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, rows=[{"prompt": text} for text in FOUR])
    rows = tiny.rows_of(tiny.train(made))
    assert {row["prompt"] for row in rows} <= set(FOUR)
    close(rows, tiny.expected_advantages(rows, CMEConfig()))


def test_sequence_level_with_the_stock_trainer(tmp_path: Path) -> None:
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer(), SEQUENCE)
    stock = GRPOTrainer(
        tiny.policy(),
        reward,  # type: ignore[arg-type]
        tiny.arguments(tmp_path),
        Dataset.from_list(tiny.CHAT),
        processing_class=tiny.tokenizer(),
    )
    received = tiny.train(stock)
    assert all(inputs["advantages"].ndim == 1 for inputs in received)
    rows = tiny.rows_of(received)
    rewards = [tiny.naive_rewards(row["prompt"], row["ids"])[1] for row in rows]
    as_trl = CMEConfig(level="sequence", eps=1e-4)  # TRL's own eps
    close(rows, tiny.expected_advantages(rows, as_trl))
    log = stock.state.log_history[0]
    assert log["rewards/cme/mean"] == pytest.approx(statistics.fmean(rewards), abs=1e-4)
    assert log["cme/coverage"] == 1.0
    assert log["cme/sequence_reward_mean"] == pytest.approx(statistics.fmean(rewards), abs=1e-4)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_with_other_rewards_and_weights(scale_rewards: str, tmp_path: Path) -> None:
    """A = 2 A_cme + V A_trl(0.5 length + 0.25 first id); V = 0.75 where TRL divides, else 1."""
    made = tiny.trainer(
        tmp_path,
        before=(length,),
        after=(first_id,),
        reward_weights=[0.5, 2.0, 0.25],
        scale_rewards=scale_rewards,
    )
    rows = tiny.rows_of(tiny.train(made))
    cme = tiny.expected_advantages(rows, CMEConfig())
    size = 0.75 if scale_rewards == "group" else 1.0
    scalar = {}
    for group in tiny.by_prompt(rows):
        ids = [row["ids"] for row in group]
        sums = [
            0.5 * a + 0.25 * (b or 0.0) for a, b in zip(length(ids), first_id(ids), strict=True)
        ]
        for row, a in zip(
            group, scalar_advantages(sums, scale=scale_rewards == "group"), strict=True
        ):
            scalar[id(row)] = size * a
    expected = [
        [2 * a + scalar[id(row)] for a in tokens] for row, tokens in zip(rows, cme, strict=True)
    ]
    close(rows, expected)


def test_where_no_other_reward_applies_only_cme_counts(tmp_path: Path) -> None:
    """As TRL does without CME: a completion that is not applicable is out of the baseline."""
    made = tiny.trainer(tmp_path, after=(first_id,))
    rows = tiny.rows_of(tiny.train(made))
    cme = tiny.expected_advantages(rows, CMEConfig())
    scalar = {}
    for group in tiny.by_prompt(rows):
        values = [math.nan if v is None else v for v in first_id([row["ids"] for row in group])]
        for row, a in zip(group, scalar_advantages(values, scale=True), strict=True):
            scalar[id(row)] = a
    assert any(a == 0 for a in scalar.values())
    assert any(a != 0 for a in scalar.values())
    close(
        rows,
        [[a + scalar[id(row)] for a in tokens] for row, tokens in zip(rows, cme, strict=True)],
    )
    log = made.state.log_history[0]
    assert log["rewards/cme/mean"] < -1
    assert log["rewards/first_id/mean"] > 0


def test_truncated_completions_left_out_of_the_loss_are_left_out_of_the_groups(
    tmp_path: Path,
) -> None:
    made = tiny.trainer(tmp_path, mask_truncated_completions=True)
    rows = tiny.rows_of(tiny.train(made))
    cut = [row for row in rows if not row["ids"]]
    kept = [row for row in rows if row["ids"]]
    assert cut
    assert all(row["ids"][-1] == tiny.EOS for row in kept)
    close(kept, tiny.expected_advantages(kept, CMEConfig()))


def two_turns(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Two sampled runs of tokens around what an environment wrote, of differing lengths."""
    rng = np.random.default_rng(0)
    ids, masks = [], []
    for k in range(len(prompts)):
        mask = [1] * (3 + k % 2) + [0] * 4 + [1] * (3 + k % 3)
        ids.append([*rng.integers(270, 1500, size=len(mask) - 1).tolist(), tiny.EOS])
        masks.append(mask)
    prompt_ids = tiny.tokenizer()([p[0]["content"] + "\n" for p in prompts])["input_ids"]
    logprobs = [[0.0] * len(row) for row in ids]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "logprobs": logprobs,
        "env_mask": masks,
        "response_mask": masks,
    }


@pytest.mark.parametrize("config", [CMEConfig(), SEQUENCE], ids=["token", "sequence"])
def test_what_an_environment_wrote_is_not_scored(
    config: CMEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    made = tiny.trainer(tmp_path, config, options={"rollout_func": two_turns})
    rows = tiny.rows_of(tiny.train(made))
    assert all(0 < sum(row["sampled"]) < len(row["ids"]) for row in rows)
    expected = {}
    for group in tiny.by_prompt(rows):
        batch = CrossModelEntropy(tiny.verifier(), tiny.tokenizer(), config)(
            [row["prompt"] for row in group],
            [row["ids"] for row in group],
            [row["sampled"] for row in group],
        )
        for b, row in enumerate(group):
            expected[id(row)] = batch.advantages(["p"] * len(group))[b, : len(row["ids"])].tolist()
    for row in rows:
        outside = [a for a, own in zip(row["advantages"], row["sampled"], strict=True) if not own]
        assert outside == [0.0] * 4
    close(rows, [expected[id(row)] for row in rows])


def test_truncated_completions_of_several_turns_count_in_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL takes every token of theirs out of its mask, as if nothing had been sampled."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    rolled: list[Any] = []

    def some_cut(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        out = two_turns(prompts, trainer)
        for ids in out["completion_ids"][::3]:
            ids[-1] = 400
        rolled.append((prompts, out))
        return out

    made = tiny.trainer(
        tmp_path, options={"rollout_func": some_cut}, mask_truncated_completions=True
    )
    tiny.train(made)
    ((prompts, out),) = rolled
    batch = CrossModelEntropy(tiny.verifier(), tiny.tokenizer())(
        prompts, out["completion_ids"], out["env_mask"]
    )
    log = made.state.log_history[0]
    mean = float(batch.sequence_rewards.mean())
    assert log["rewards/cme/mean"] == pytest.approx(mean, abs=1e-5)
    assert log["cme/dropped_nats"] == pytest.approx(batch.metrics["dropped_nats"], abs=1e-5)


def test_the_stock_trainer_needs_a_mask_for_several_turns() -> None:
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer(), SEQUENCE)
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    ids = [[400, 500, 600]]
    with pytest.raises(InputError, match="which tokens were sampled"):
        reward(prompts=["p"], completion_ids=ids, completions=[turns])
    with_mask = reward(["p"], ids, completions=[turns], response_mask=[[1, 0, 1]])
    masked = CrossModelEntropy(tiny.verifier(), tiny.tokenizer(), SEQUENCE)(["p"], ids, [[1, 0, 1]])
    assert with_mask == masked.sequence_rewards.tolist()


def test_the_policy_baseline(tmp_path: Path) -> None:
    """Given by TRL where it has them, computed where not; both the same at the first step."""
    config = CMEConfig(baseline="policy")
    found = []
    # Generating for four micro-batches while accumulating two has TRL compute them.
    for steps in (2, 4):
        made = tiny.trainer(tmp_path, config, steps_per_generation=steps)
        asked: list[Any] = []
        scorer = made._cme
        made._cme = _Spy(scorer, asked)
        tiny.train(made)
        (prompts, ids, _, policy), *_ = asked
        found.append([row.tolist() for row in policy])
        with torch.no_grad():
            start = made._tokenizer(prompts[0][0]["content"] + "\n")["input_ids"]
            logits = tiny.policy()(torch.tensor([start + ids[0]])).logits[0].log_softmax(-1)
        own = [logits[len(start) - 1 + t, i].item() for t, i in enumerate(ids[0])]
        assert found[-1][0] == pytest.approx(own, abs=1e-4)


class _Spy:
    def __init__(self, scorer: Any, asked: list[Any]) -> None:
        self.scorer, self.asked, self.config = scorer, asked, scorer.config

    def __call__(self, *args: Any) -> Any:
        self.asked.append(args)
        return self.scorer(*args)


def test_ids_that_only_the_model_has_do_not_end_a_run(tmp_path: Path) -> None:
    """Models pad their vocabulary, and sampling at T = 1 reaches every id of it."""
    size = len(tiny.tokenizer())
    ids = [[400, size + 3, 500, tiny.EOS], [size + 1], [600, tiny.EOS]]
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer(), SEQUENCE)
    assert all(math.isfinite(value) for value in reward(["p"] * 3, ids))
    # An id without text: the rest of its turn is read as if it were not there.
    without = reward(["p"], [[400, 500, tiny.EOS]])[0]
    assert reward(["p"], ids[:1])[0] == pytest.approx(without, abs=1e-6)
    cut = reward(["p"], [[400, 500]])[0]  # no end of turn, though the last id is special
    assert reward(["p"], [[400, 500, size + 3]])[0] == pytest.approx(cut, abs=1e-6)
    assert cut != pytest.approx(without, abs=1e-3)


def test_where_trl_stops_is_the_end_of_a_response(tmp_path: Path) -> None:
    """A model's generation config may name more ends than its tokenizer does."""
    policy = tiny.policy()
    assert policy.generation_config is not None
    policy.generation_config.eos_token_id = [tiny.EOS, 2]
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer())
    made = CMEGRPOTrainer(
        policy,
        reward,
        tiny.arguments(tmp_path),
        Dataset.from_list(tiny.CHAT),
        processing_class=tiny.tokenizer(),
    )
    assert made._cme.generator.eos_ids.tolist() == [tiny.EOS, 2]
    assert reward.scorer.generator.eos_ids.tolist() == [tiny.EOS]


def test_two_processes_normalise_groups_together(tmp_path: Path) -> None:
    """Two rollouts of a prompt on each process; the four are one group."""
    of_ranks = tiny.two_processes(tmp_path, "cme")
    rows = [row for received, _ in of_ranks for row in tiny.rows_of(received)]
    assert [len(tiny.rows_of(received)) for received, _ in of_ranks] == [2, 2]
    (group,) = tiny.by_prompt(rows)
    assert len(group) == 4
    close(rows, tiny.expected_advantages(rows, CMEConfig()))
    alone = tiny.rows_of(of_ranks[0][0])
    assert tiny.worst_error(alone, tiny.expected_advantages(alone, CMEConfig())) > 0.1
    sequence = [tiny.naive_rewards(row["prompt"], row["ids"])[1] for row in rows]
    log = of_ranks[0][1][0]
    assert log["rewards/cme/mean"] == pytest.approx(statistics.fmean(sequence), abs=1e-4)
    assert log["reward_std"] == pytest.approx(statistics.stdev(sequence), abs=1e-4)


def test_metrics_and_the_table_of_completions(tmp_path: Path) -> None:
    made = tiny.trainer(
        tmp_path, log_completions=True, num_completions_to_print=0, reward_weights=[2.0]
    )
    rows = tiny.rows_of(tiny.train(made))
    sequence = [tiny.naive_rewards(row["prompt"], row["ids"])[1] for row in rows]
    log = made.state.log_history[0]
    assert log["rewards/cme/mean"] == pytest.approx(statistics.fmean(sequence), abs=1e-4)
    assert log["rewards/cme/std"] == pytest.approx(statistics.stdev(sequence), abs=1e-4)
    assert log["reward"] == pytest.approx(2 * statistics.fmean(sequence), abs=1e-4)
    assert log["reward_std"] == pytest.approx(2 * statistics.stdev(sequence), abs=1e-4)
    assert log["frac_reward_zero_std"] == 0
    shares = [np.mean([a != 0 for a in row["advantages"]]) for row in rows]
    assert log["cme/credited"] == pytest.approx(np.mean(shares))
    own = ("special_masked", "thinking_tokens", "thinking_unclosed")
    for name in ("coverage", "dropped_nats", "repetition", "length_correlation", "truncated", *own):
        assert f"cme/{name}" in log
    table = made._logs
    assert sorted(table["rewards"]["cme"]) == pytest.approx(sorted(sequence), abs=1e-4)
    means = [np.mean(row["advantages"]) for row in rows]
    assert sorted(table["advantages"]) == pytest.approx(sorted(means), abs=1e-5)
    assert (tmp_path / "completions" / "completions_00001.parquet").is_file()


def test_evaluation(tmp_path: Path) -> None:
    made = tiny.trainer(
        tmp_path,
        options={"eval_dataset": Dataset.from_list(tiny.CHAT)},
        per_device_eval_batch_size=8,
        num_generations_eval=2,
    )
    made.evaluate()
    (log,) = [entry for entry in made.state.log_history if "eval_cme/coverage" in entry]
    assert log["eval_rewards/cme/mean"] < -1


def test_a_checkpoint_resumes_where_it_was(tmp_path: Path) -> None:
    whole = tiny.train(tiny.trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1))
    again = tiny.trainer(tmp_path, max_steps=2)
    rest = tiny.train(again, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2
    for before, after in zip(whole[2:], rest, strict=True):
        assert before["completion_ids"].tolist() == after["completion_ids"].tolist()
        torch.testing.assert_close(before["advantages"], after["advantages"], atol=1e-5, rtol=0)


def test_any_scorer_of_the_same_interface_can_take_the_place(tmp_path: Path) -> None:
    """One line of configuration apart: another reward, under its own name."""

    class Other:
        config = CMEConfig()

        def __call__(self, prompts: Any, ids: Any, masks: Any, policy: Any) -> Any:
            cme = CrossModelEntropy(tiny.verifier(), tiny.tokenizer())
            return cme(prompts, ids, masks, policy)

    made = CMEGRPOTrainer(
        tiny.policy(),
        RewardFunction(Other(), name="other"),
        tiny.arguments(tmp_path),
        Dataset.from_list(tiny.CHAT),
        processing_class=tiny.tokenizer(),
    )
    rows = tiny.rows_of(tiny.train(made))
    close(rows, tiny.expected_advantages(rows, CMEConfig()))
    assert made.state.log_history[0]["other/coverage"] == 1.0


def test_the_reward_function_pickles() -> None:
    reward = cme_reward_func("embedded", str(tiny.GENERATOR), SEQUENCE)
    again = pickle.loads(pickle.dumps(reward))
    ids = [[400, 500, tiny.EOS]]
    assert again(["p"], ids) == reward(["p"], ids)
    assert again.__name__ == "cme"


BAD_SETTINGS = [
    ({"importance_sampling_level": "sequence"}, "credit per token is lost"),
    ({"off_policy_mask_threshold": 0.1}, "keep its positive ones"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "sum_then_normalize"),
    ({"scale_rewards": "batch"}, "would have no effect"),
    ({"scale_rewards": "none"}, r"CMEConfig\(scale='std'\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_settings_that_break_token_advantages(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.trainer(tmp_path, **changes)


def test_settings_that_are_fine_elsewhere(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, importance_sampling_level="sequence", loss_type="cispo")
    tiny.trainer(tmp_path, SEQUENCE, importance_sampling_level="sequence", loss_type="grpo")
    tiny.trainer(tmp_path, SEQUENCE, off_policy_mask_threshold=0.1)
    tiny.trainer(tmp_path, after=(length,), scale_rewards="batch")


def test_an_unknown_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'new' has not been checked"):
        tiny.trainer(tmp_path, loss_type="new")


def test_trls_own_defaults_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = "trl.trainer.grpo_trainer.GRPOConfig"  # in bf16, which needs a GPU
    monkeypatch.setattr(made, lambda _: tiny.arguments(tmp_path))
    unscaled = CMEConfig(scale="none")
    with pytest.raises(ConfigError, match="would have no effect"):
        CMEGRPOTrainer(
            tiny.policy(),
            cme_reward_func(tiny.verifier(), tiny.tokenizer(), unscaled),
            train_dataset=Dataset.from_list(tiny.CHAT),
            processing_class=tiny.tokenizer(),
        )


def test_without_trl_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "trl" or name == "cme_reward.trl.trainer":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cme_reward.trl, "CMEGRPOTrainer", raising=False)
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cme-reward\[trl\]"'):
        cme_reward.trl.CMEGRPOTrainer  # noqa: B018


@pytest.mark.parametrize("funcs", [[], [length], ["cme", "cme"]])
def test_exactly_one_entry(funcs: list[Any], tmp_path: Path) -> None:
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer())
    entries = [reward if func == "cme" else func for func in funcs]
    with pytest.raises(ConfigError, match=f"has {funcs.count('cme')} entries"):
        CMEGRPOTrainer(tiny.policy(), entries, tiny.arguments(tmp_path))


def test_the_policys_tokenizer_is_asked_for(tmp_path: Path) -> None:
    reward = cme_reward_func(tiny.verifier(), tiny.verifier().tokenizer)
    with pytest.raises(ConfigError, match=r"2048 tokens.*1500 tokens"):
        CMEGRPOTrainer(
            tiny.policy(),
            reward,
            tiny.arguments(tmp_path),
            Dataset.from_list(tiny.CHAT),
            processing_class=tiny.tokenizer(),
        )


@pytest.mark.parametrize("config", [CMEConfig(), CMEConfig(level="sequence", baseline="policy")])
def test_the_stock_trainer_cannot_take_tokens_or_give_log_probs(config: CMEConfig) -> None:
    reward = cme_reward_func(tiny.verifier(), tiny.tokenizer(), config)
    with pytest.raises(ConfigError, match="needs CMEGRPOTrainer"):
        reward(prompts=["p"], completion_ids=[[400]])
