"""veRL's real trainer, a process of its own, with a tiny policy and a real verifier on the CPU.

Each run takes about a minute. What reached the actor's loss is held against rewards and advantages
that `verl_rig.naive` computes from the ids, with none of the package's code.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner
from verl_rig import naive
from verl_rig.loops import OBSERVATION
from verl_rig.models import make_policy, make_prompts
from verl_rig.record import read
from verl_rig.run import ROOT, Run, finish, kill, settings, start
from verl_rig.server import Server

from cme_reward.cli.app import app

LOOPS = {"actor_rollout_ref.rollout.agent.agent_loop_config_path": str(
    ROOT / "tests" / "support" / "verl_rig" / "loops.yaml"
)}  # fmt: skip
EXACT = {"verifier": f"hf:{naive.TRAINED}", "verifier_options": {"dtype": "float64"}}


@pytest.fixture
def base(policy: Path, tmp_path: Path) -> dict[str, Any]:
    data = make_prompts(tmp_path / "prompts.parquet")
    return {"reward_fn": "cme_reward.verl:CMEReward", **settings(policy, data, steps=2)}


def run(folder: Path, config: dict[str, Any], **kwargs: Any) -> Run:
    return finish(start(folder, config, **kwargs), folder)


def asked(done: Run) -> list[list[int]]:
    """What the stand-in for a hosted verifier was asked: prompts and responses, as ids."""
    lines = (done.record / "asked.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def not_wanted(done: Run, verifier: naive.NaiveVerifier) -> list[str]:
    """What the verifier was shown and should not have been, or was not and should have been."""
    differ = set(map(tuple, asked(done))) ^ set(map(tuple, verifier.asked))
    texts = [verifier.tokenizer.decode(list(ids)) for ids in differ]
    return [text for text in texts if "equals" in text]  # the others are the client's handshake


def observation(said: str) -> naive.Message:
    """What the agent loops' environments answer: `ToolAgentLoop`'s tool, or `TwoTurns`."""
    call = re.search(r'"a": (\d+), "b": (\d+)', said)
    if call is None:
        return {"role": "user", "content": OBSERVATION}
    return {"role": "tool", "content": f"The sum is {int(call[1]) + int(call[2])}."}


def difference(done: Run, policy: Path, rows_per_step: int, score: Any = None) -> float:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    verifier = naive.NaiveVerifier(naive.TRAINED)

    def naive_score(content: str, ids: list[int], sampled: list[int]) -> Any:
        return naive.token_rewards(verifier, tokenizer, content, ids, sampled)

    calls = read(done.record)
    return naive.largest_difference(calls, rows_per_step, tokenizer, score or naive_score)


def kept(file: Path, run: Path) -> list[dict[str, Any]]:
    """The samples in a file, of which the report of a run has a heat map each."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    page = run.parent / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--html", str(page)])
    assert done.exit_code in (0, 1), done.output  # an untrained policy may show a sign
    assert page.read_text().count("<article>") == len(rows)
    return rows


def trained(
    rows: list[dict[str, Any]], done: Run, tokenizer: Any, n: int
) -> Iterator[tuple[dict[str, Any], str, list[int], list[int]]]:
    """The samples of both steps, each with its prompt, ids and mask as the actor received them.

    They are one response to each of the `n` prompts with the lowest hashes among a step's.
    """
    received = [
        (naive.content_of(tokenizer, prompt), ids.tolist(), sampled.tolist())
        for call in read(done.record)
        for prompt, ids, sampled in zip(
            *(call["rows"][name] for name in ("prompts", "responses", "response_mask")),
            strict=True,
        )
    ]
    for step in (0, 1):
        had = received[16 * step : 16 * step + 16]
        prompts = {json.dumps([naive.user(content)], sort_keys=True) for content, *_ in had}
        lowest = sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).digest())[:n]
        of_step = [row for row in rows if row["step"] == step]
        assert [row["prompt"] for row in of_step] == [json.loads(text) for text in lowest]
        for row in of_step:
            content = row["prompt"][0]["content"]
            yield next(
                (row, content, ids, sampled)
                for prompt, ids, sampled in had
                if prompt == content and row["tokens"] == texts(tokenizer, ids)
            )


def texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return ["" if i >= len(tokenizer) else tokenizer.decode([i]) for i in ids]


def compare_samples(rows: Any, done: Run, tokenizer: Any, n: int, score: Any) -> None:
    """Their log-probs and masks with what is computed from the ids."""
    for row, content, ids, sampled in trained(rows, done, tokenizer, n):
        rewards, mask = score(content, ids, sampled)
        assert row["mask"] == mask.tolist()
        np.testing.assert_allclose(np.where(mask, row["token_logprobs"], 0), rewards, atol=1e-5)


def explain(done: Run) -> str:
    lines = [line for line in done.log.splitlines() if "Error" in line]
    return "\n".join([f"exit status {done.status}", *lines[-5:], *done.log.splitlines()[-25:]])


def test_streaming_with_tools_a_reference_policy_and_two_mini_batches(
    base: dict[str, Any], policy: Path, tmp_path: Path
) -> None:
    """An in-process verifier in the one named actor that all reward workers share."""
    config = {
        **base,
        **LOOPS,
        "cme": {**EXACT, "samples": 3},
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "cme",
        "trainer.experiment_name": "streaming",
        "actor_rollout_ref.rollout.agent.default_agent_loop": "tool_text",
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "reward.num_workers": 3,
    }
    done = run(tmp_path / "run", config)
    assert done.status == 0, explain(done)
    assert difference(done, policy, rows_per_step=16) < 1e-5
    calls = read(done.record)
    tool_rows = [mask for call in calls for mask in call["rows"]["response_mask"] if 0 in mask]
    assert len(tool_rows) == 32
    assert all("ref_log_prob" in call["rows"] for call in calls)
    # Two mini-batches: the second one's policy is no longer that of the rollouts.
    assert {call["metrics"]["actor/ppo_kl"] != 0 for call in calls} == {True, False}
    assert done.log.count(f"cme_reward: verifier hf:{naive.TRAINED}") == 1
    assert len(set(re.findall(r"\(Scorer pid=(\d+)\)", done.log))) <= 1

    steps = done.steps()
    assert [int(step["training/global_step"]) for step in steps] == [1, 2]
    for step in steps:
        assert step["cme/responses"] == 16
        assert step["cme/coverage"] == 1
        assert -30 < step["cme/token_reward_mean"] < 0
        assert 0.5 < step["cme/credited"] <= step["cme/scored"] <= 1
        assert step["cme/verifier_seconds"] > 0
        assert {"cme/dropped_nats", "cme/repetition", "cme/truncated"} <= step.keys()
        assert {"cme/special_masked", "cme/thinking_tokens"} <= step.keys()
        # Tool tokens have no reward: veRL adds up rewards without a mask.
        assert step["critic/score/mean"] == pytest.approx(step["critic/rewards/mean"])

    tokenizer, verifier = AutoTokenizer.from_pretrained(policy), naive.NaiveVerifier(naive.TRAINED)
    log = tmp_path / "run" / "cme" / "streaming.jsonl"
    compare_samples(
        kept(log.with_name("streaming.cme-samples.jsonl"), log),
        done,
        tokenizer,
        3,
        lambda *row: naive.token_rewards(verifier, tokenizer, *row),
    )


def test_the_sequence_level_with_verls_own_grpo(
    base: dict[str, Any], policy: Path, tmp_path: Path
) -> None:
    cme = {**EXACT, "verifier": "embedded", "level": "sequence"}  # always a chat model here
    folder = tmp_path / "checkpoints"
    config = {**base, "cme": {**cme, "samples": 9}, "trainer.default_local_dir": str(folder)}
    done = run(tmp_path / "run", config)
    assert done.status == 0, explain(done)
    tokenizer, verifier = AutoTokenizer.from_pretrained(policy), naive.NaiveVerifier()
    worst = naive.largest_difference(
        read(done.record),
        16,
        tokenizer,
        lambda *row: naive.sequence_rewards(verifier, tokenizer, *row),
        eps=1e-6,
        normalise=naive.grpo,
    )
    assert worst < 1e-5
    assert "cme_grpo" not in done.log
    # Without a log that a report reads, samples are where checkpoints go.
    lines = (folder / "cme-samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 4 + 4  # fewer prompts a step than asked for
    for row, content, ids, sampled in trained(rows, done, tokenizer, 9):
        rewards, mask = naive.sequence_rewards(verifier, tokenizer, content, ids, sampled)
        assert row["sequence_reward"] == pytest.approx(rewards[-1], abs=1e-5)
        assert row["mask"] == mask.tolist()


def test_a_colocated_verifier_with_two_turns_by_verls_own_keys(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """veRL hosts the verifier (a stand-in for vLLM: there is no GPU) and scores after rollouts.

    Started by the stock `python -m verl.trainer.main_ppo`, with the keys of `--print-config`. The
    policy's chat template is OLMo's, of plain text, and in it an environment speaks between turns.
    A token is credited with what follows it.
    """
    policy = make_policy(tmp_path / "olmo", family="olmo")
    config = {
        **base,
        **LOOPS,
        "cme": {"verifier": "hosted", "credit": "return", "gamma": 0.8, "samples": 2},
        "trainer.logger": ["console", "tensorboard"],
        "trainer.project_name": "cme",
        "trainer.experiment_name": "colocated",
        "actor_rollout_ref.model.path": str(policy),
        "data.max_response_length": 64,
        "reward.reward_model.model_path": str(naive.EMBEDDED),
        "reward.reward_model.rollout.name": "vllm",
        "reward.reward_model.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.agent.default_agent_loop": "two_turns",
        "trainer.test_freq": 2,
        "data.val_max_samples": 2,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    printed = subprocess.run(
        [sys.executable, "-m", "cme_reward.verl", str(file), "--print-config"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    python, m, module, *overrides = shlex.split(printed.replace("\\\n", " "))
    assert (python, m, module) == ("python", "-m", "verl.trainer.main_ppo")
    done = run(tmp_path / "run", {}, overrides=overrides, module=module)
    assert done.status == 0, explain(done)
    tokenizer, verifier = AutoTokenizer.from_pretrained(policy), naive.NaiveVerifier()
    ends = set()

    def tokens(content: str, ids: list[int], sampled: list[int]) -> Any:
        return naive.token_rewards(verifier, tokenizer, content, ids, sampled, observation)

    def score(content: str, ids: list[int], sampled: list[int]) -> Any:
        ends.add(ids[sampled.index(0) - 1] == tokenizer.eos_token_id)
        rewards, mask = tokens(content, ids, sampled)
        own = [float(r) if m else None for r, m in zip(rewards, mask, strict=True)]
        returns = oracle.returns_to_go(own, sampled, 0.8)
        return (
            np.array([r or 0.0 for r in returns]),
            np.array([r is not None for r in returns]),
        )

    assert difference(done, policy, rows_per_step=16, score=score) < 1e-5
    assert ends == {True, False}  # first turns that ended, and some that were cut off
    # Validation's responses do not reach the actor.
    trained = set(map(tuple, verifier.asked))
    assert trained < set(map(tuple, asked(done)))
    assert f"{OBSERVATION}\n" not in "".join(map(verifier.tokenizer.decode, asked(done)))
    last = done.steps()[-1]
    assert last["cme/responses"] == 16
    assert last["val-cme/responses"] == 2
    assert -30 < last["val-cme/sequence_reward_mean"] < 0
    # veRL's own: the sum of a response's rewards.
    assert last["val-core/toy/reward/mean@1"] < last["val-cme/sequence_reward_mean"]

    folder = tmp_path / "run" / "tensorboard_log" / "cme" / "colocated"
    rows = kept(folder / "cme-samples.jsonl", folder)
    validated = [row for row in rows if row["step"] == 2]
    assert sorted(row["prompt"][0]["content"] for row in validated) == [
        "0 plus 1 equals",
        "1 plus 2 equals",
    ]
    mean = sum(row["sequence_reward"] for row in validated) / 2
    assert mean == pytest.approx(last["val-cme/sequence_reward_mean"], abs=1e-4)
    compare_samples(rows, done, tokenizer, 2, tokens)


def test_a_verifier_pool_of_its_own_two_outputs_per_trajectory_and_verls_tool_agent(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming from a hosted verifier (the stand-in, speaking SGLang's protocol).

    Half of the prompts go to veRL's own `ToolAgentLoop` with a tool, whose calls the generator
    writes; half to a loop with an output for each turn. The policy's template is Mistral's.
    """
    monkeypatch.setenv("VERL_RIG_CALLS", "1")
    policy = make_policy(tmp_path / "mistral", family="mistral")
    data = make_prompts(tmp_path / "agents.parquet", agents=("two_outputs", "tool_agent"))
    config = {
        **base,
        **LOOPS,
        "cme": {"verifier": "hosted"},
        "data.train_files": str(data),
        "data.max_prompt_length": 384,
        "data.max_response_length": 64,
        "actor_rollout_ref.model.path": str(policy),
        "reward.reward_model.model_path": str(naive.EMBEDDED),
        "reward.reward_model.rollout.name": "sglang",
        "reward.reward_model.rollout.tensor_model_parallel_size": 1,
        "reward.reward_model.enable_resource_pool": True,
        "reward.reward_model.n_gpus_per_node": 1,
        "reward.reward_model.nnodes": 1,
        "actor_rollout_ref.rollout.multi_turn.format": "hermes",
        "actor_rollout_ref.rollout.multi_turn.function_tool_path": str(
            ROOT / "tests" / "support" / "verl_rig" / "tools.py"
        ),
        "trainer.total_training_steps": 1,
    }
    done = run(tmp_path / "run", config, gpus=2)
    assert done.status == 0, explain(done)
    calls = read(done.record)
    rows = [dict(zip(call["rows"], row, strict=True)) for call in calls
            for row in zip(*call["rows"].values(), strict=True)]  # fmt: skip
    rows = [row for row in rows if row["response_mask"].any()]  # veRL fills up the batch
    assert len(rows) == 8 * 2 + 8
    tokenizer, verifier = AutoTokenizer.from_pretrained(policy), naive.NaiveVerifier()
    told: list[int] = tokenizer.encode(
        f"[TOOL_RESULTS] {OBSERVATION}[/TOOL_RESULTS]", add_special_tokens=False
    )
    groups, rewards, masks, got, tools = [], [], [], [], 0
    for row in rows:
        prompt, ids = row["prompts"].tolist(), row["responses"].tolist()
        content = naive.content_of(tokenizer, prompt)
        first = tokenizer.encode(f"<s>[INST] {content}[/INST]", add_special_tokens=False)
        tool = "[AVAILABLE_TOOLS]" in tokenizer.decode(prompt)
        # Nothing before the response, but in second outputs.
        said = [] if tool else prompt[len(first) :]
        assert tool or prompt[: len(first)] == first
        assert said[-len(told) :] == (told if said else [])
        sampled = [1] * (len(said) - len(told)) + [0] * len(told) if said else []
        own = row["response_mask"].tolist()
        assert (0 in own) == tool
        tools += tool
        everything, mask = naive.token_rewards(
            verifier, tokenizer, content, said + ids, sampled + own, observation
        )
        groups.append(content)
        rewards.append(everything[len(said) :])
        masks.append(mask[len(said) :])
        got.append(row["advantages"])
    assert tools == 8
    wanted = naive.advantages(rewards, masks, groups, eps=0.1)
    worst = max(
        abs(g[: len(w)].double().numpy() - w).max() for g, w in zip(got, wanted, strict=True)
    )
    assert worst < 1e-5
    assert sum((abs(w) > 0.1).sum() for w in wanted) > 32
    assert not not_wanted(done, verifier)
    shown = "".join(map(verifier.tokenizer.decode, asked(done)))
    assert not re.search(r"\[/?(INST|TOOL_RESULTS)\]", shown)


def test_an_endpoint_that_dies_in_the_middle_of_the_papers_run(
    policy: Path, tmp_path: Path
) -> None:
    """It comes back and the run goes on; it dies for good and the run stops and names it."""
    server = Server(tmp_path / "server.txt")
    folder = tmp_path / "run"
    data = make_prompts(tmp_path / "prompts.parquet")
    config = {
        **settings(policy, data, steps=1000),
        "cme.verifier": f"vllm:{server.url}",
        "cme.verifier_options": {"total_seconds": 60},
        "cme.num_gpus": 0,
        "actor_rollout_ref.rollout.n": 4,
    }
    server.start()
    process = start(folder, config, file=ROOT / "adapters" / "verl" / "paper.yaml")
    try:
        before = wait_for_rows(process, folder, 1)
        server.kill()
        stopped = rows_when_nothing_moves(folder)
        assert process.poll() is None
        server.start()
        assert before <= stopped < wait_for_rows(process, folder, stopped + 32)
        server.kill()
        done = finish(process, folder)
    finally:
        kill(process)
        server.kill()
    assert done.status not in (0, -1)
    last = done.log.rpartition("VerifierError: rewards are missing")[2]
    assert "no step is trained without them" in last
    assert server.url in last
    assert done.log.count("VerifierError: rewards are missing") >= 1
    # Every step, also those around the interruptions, was trained on whole rewards.
    assert difference(done, policy, rows_per_step=16) < 1e-5


def n_rows(folder: Path) -> int:
    return sum(len(call["rows"]["advantages"]) for call in read(folder / "record"))


def wait_for_rows(process: Any, folder: Path, n: int) -> int:
    while n_rows(folder) < n:
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(1)
    return n_rows(folder)


def rows_when_nothing_moves(folder: Path) -> int:
    """The rows that reached the actor, once no more do."""
    n = -1
    while n != n_rows(folder):
        n = n_rows(folder)
        time.sleep(10)
    return n


def test_summing_estimators_stop_before_anything_starts(
    base: dict[str, Any], tmp_path: Path
) -> None:
    config = {**base, "cme": EXACT, "algorithm.adv_estimator": "grpo"}
    done = run(tmp_path / "run", config)
    assert done.status == 2
    assert "credit per token is lost" in done.log
