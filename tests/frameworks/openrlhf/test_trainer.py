"""`openrlhf.cli.train_ppo_ray` itself, on the CPU: its advantages against a recomputation."""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import runs
from server_tools import Program
from two_turns import observation, pay
from typer.testing import CliRunner

from cme_reward import CMEConfig, SpanTable
from cme_reward.cli.app import app

ADAPTERS = Path(__file__).parent.parent.parent.parent / "adapters" / "openrlhf"
OURS, STOCK = ["cme_reward.openrlhf"], ["openrlhf.cli.train_ppo_ray"]
SCRIPT = ["sh", str(ADAPTERS / "train.sh")]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("rig")
    runs.save_policy(folder / "policy")
    runs.save_policy(folder / "gemma", 4.0, runs.gemma(), "<end_of_turn>")
    runs.save_prompts(folder / "prompts.jsonl")
    with runs.cluster(folder) as address:
        yield SimpleNamespace(folder=folder, ray=address["ray"])


def train(rig: Any, command: Any, settings: dict[str, str], **changes: Any) -> list[list[Any]]:
    """Train two steps; what the trainer's experience maker returned in each.

    What it printed is kept in `rig.output`.
    """
    status, output, steps = runs.train(
        rig.folder, rig.ray, [*command, *runs.flags(rig.folder, **changes)], **settings
    )
    assert status == 0, output[-6000:]
    rig.output = output
    assert [len(rows) for rows in steps] == [8, 8]
    for rows in steps:
        lengths = {len(row["ids"]) for row in rows}
        assert len(lengths) > 1
        assert max(abs(a) for row in rows for a in row["advantages"]) > 0.3
    return steps


def equal(rows: list[Any], expected: dict[int, list[float]]) -> None:
    error = runs.worst_error(rows, expected)
    print(f"largest difference of an advantage: {error:.1e}")
    assert error <= 1e-5


def read_samples(file: Path, steps: int) -> list[list[dict[str, Any]]]:
    """The samples in a file, for each step its rows."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {row["step"] for row in rows} == set(range(steps))
    return [[row for row in rows if row["step"] == step] for step in range(steps)]


def compare_sample(
    sample: dict[str, Any],
    ids: list[int],
    rewards: list[float | None],
    sequence: float,
    writer: Any,
) -> None:
    assert sample["tokens"] == SpanTable(writer).tokens(ids)
    assert sample["mask"] == [reward is not None for reward in rewards]
    for got, want in zip(sample["token_logprobs"], rewards, strict=True):
        assert want is None or got == pytest.approx(want, abs=1e-4)
    assert sample["sequence_reward"] == pytest.approx(sequence, abs=1e-4)
    assert sample["dropped_nats"] >= 0


def test_token_level_with_all_that_openrlhf_adds(rig: Any) -> None:
    """By the script with the paper's settings; a KL and a length penalty, clipping, two engines."""
    steps = train(
        rig,
        SCRIPT,
        {"CME_VERIFIER": "embedded"},
        **{
            "vllm.num_engines": 2,
            "algo.kl.init_coef": 0.05,
            "reward.overlong_buffer_len": 8,
            "reward.overlong_penalty_factor": 2.0,
            "reward.clip_range": (-1.2, 1.3),
            "logger.tensorboard_dir": rig.folder / "tensorboard",
            "logger.wandb.run_name": "token",
        },
    )

    def penalty(row: Any) -> float:
        return -2.0 * max(len(row["ids"]) - 4, 0) / 8

    for rows in steps:
        want = runs.expected_advantages(
            rows, CMEConfig(), beta=0.05, limits=(-1.2, 1.3), penalty=penalty
        )
        equal(rows, want)
        assert all(0 < row["info"]["score"] < 1 for row in rows)
        assert all(row["info"]["cme/coverage"] == 1 for row in rows)
        assert {row["info"]["cme/credited"] > 0.5 for row in rows} >= {True}
    hosts = set(re.findall(r"VerifierHost pid=(\d+)", rig.output))
    assert len(hosts) == 1  # both engines ask one verifier
    # The second step is off the reference policy.
    assert max(abs(k) for row in steps[1] for k in row["kl"]) > 0

    # The first rollout of each prompt, beside the events; the script asks for more.
    kept = read_samples(rig.folder / "tensorboard" / "token" / "cme-samples.jsonl", 2)
    for rows, samples in zip(steps, kept, strict=True):
        assert "cme_token_logprobs" not in rows[0]["info"]
        firsts = {
            runs.question_of(row["prompt"]): row for row in rows if row["index"] % runs.GROUP == 0
        }
        assert [len(sample["prompt"]) for sample in samples] == [1, 1]
        assert {sample["prompt"][0]["content"] for sample in samples} == firsts.keys()
        for sample in samples:
            assert sample["prompt"][0]["role"] == "user"
            question = sample["prompt"][0]["content"]
            ids = firsts[question]["ids"]
            rewards, sequence = runs.naive_rewards(question, ids)
            compare_sample(sample, ids, rewards, sequence, runs.tokenizer())
    page = rig.folder / "report.html"
    told = ["report", str(rig.folder / "tensorboard"), "--html", str(page)]
    done = CliRunner().invoke(app, told)
    assert done.exit_code in (0, 1), done.output  # an untrained policy may show a sign
    assert page.read_text(encoding="utf-8").count("<article>") == 4


def test_two_turns_with_an_environment_trained_while_generating(rig: Any) -> None:
    """Another actor trains then; labels carry the messages; settings are in a file.

    The policy's chat template is Gemma's, and the environment writes in it between two turns. A
    token is credited with what follows it.
    """
    file = rig.folder / "settings.yaml"
    file.write_text(
        "verifier: embedded\nenvironment_weight: 0.5\nsamples: 1\n"
        "cme:\n  eps: 0.05\n  credit: return\n  gamma: 0.8\n",
        encoding="utf-8",
    )
    config = CMEConfig(eps=0.05, credit="return", gamma=0.8)
    steps = train(
        rig,
        OURS,
        {"CME_SETTINGS": str(file)},
        **{
            "train.async_enable": True,
            "train.agent_func_path": runs.HERE / "two_turns.py",
            "actor.model_name_or_path": rig.folder / "gemma",
            "data.label_key": "conversation",
            "data.max_len": 128,
            "ckpt.output_dir": rig.folder / "async",
        },
    )
    shown: list[list[int]] = []
    turns = []
    for rows in steps:
        whole = [runs.with_observations(row) for row in rows]
        want = runs.expected_advantages(whole, config, score=lambda row: two_turns(row, shown))
        for row in whole:  # an environment's tokens have a position, and no advantage
            own = zip(want[row["index"]], row["sampled"], strict=True)
            want[row["index"]] = [a * sampled for a, sampled in own]
            turns.append(1 + (False in row["sampled"]))
        equal(whole, want)
    assert turns.count(2) >= 12
    asked = runs.read_asked(rig.folder)
    assert sorted(asked) == sorted(shown)
    assert "_of_turn>" not in "".join(map(runs.verifier().tokenizer.decode, asked))

    # Without events, where the model goes; what the environment pays is in no log-prob.
    kept = read_samples(rig.folder / "async" / "cme-samples.jsonl", 2)
    for rows, (sample,) in zip(steps, kept, strict=True):
        firsts = [row for row in rows if row["index"] % runs.GROUP == 0]
        (row,) = (row for row in firsts if json.loads(row["label"]) == sample["prompt"])
        rewards, sequence = two_turns(runs.with_observations(row), [], weight=0.0)
        ids = runs.with_observations(row)["ids"]
        compare_sample(sample, ids, rewards, sequence, runs.gemma())


def two_turns(
    row: Any, shown: list[list[int]], weight: float = 0.5
) -> tuple[list[float | None], float]:
    """Rewards of a rollout's tokens, None where the environment wrote; and of all of it.

    Adds to `shown` what the verifier is to read: its own chat template over exactly the messages.
    """
    policy, messages = runs.gemma(), json.loads(row["label"])
    rewards, logp, start, said = [], [], 0, ""
    for sampled, run in itertools.groupby(row["sampled"]):
        ids = row["ids"][start : start + len(list(run))]
        start += len(ids)
        if not sampled:
            assert observation(said) in policy.decode(ids)
            messages.append({"role": "user", "content": observation(said)})
            rewards += [None] * len(ids)
            continue
        asked, of_turn, own = runs.naive_scores(messages, ids, policy, "<end_of_turn>")
        shown.append(asked)
        rewards += of_turn
        logp += own
        stopped = policy.decode(ids[-1:]) in ("<end_of_turn>", "<eos>")
        said = policy.decode(ids[: len(ids) - stopped])  # what the environment reads
        text = oracle.without_word_space(policy.decode(ids, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": text})
    if False in row["sampled"]:  # what the environment pays is in every return once
        last = max(t for t, reward in enumerate(rewards) if reward is not None)
        rewards[last] = (rewards[last] or 0.0) + weight * pay(said)
    return rewards, statistics.fmean(logp)


OPENRLHFS = CMEConfig(level="sequence", eps=1e-9)  # how OpenRLHF itself normalises


def test_sequence_level_through_the_file(rig: Any) -> None:
    file = str(ADAPTERS / "reward_func.py")
    steps = train(rig, OURS, {"CME_VERIFIER": "embedded"}, **{"reward.remote_url": file})
    for rows in steps:
        assert runs.worst_in_nats(rows, OPENRLHFS) <= 1e-5
        assert all(0 < row["info"]["score"] < 1 for row in rows)


def test_sequence_level_through_two_servers(rig: Any) -> None:
    """OpenRLHF as it is, this package in the servers alone."""
    policy = str(rig.folder / "policy")
    words = ["--verifier", "embedded", "--generator-tokenizer", policy]
    with ExitStack() as stack:
        servers = [Program(*words, cwd=rig.folder) for _ in range(2)]
        for server in servers:
            stack.callback(server.stop)
        urls = ",".join(f"{server.url}/get_reward" for server in servers)
        steps = train(rig, STOCK, {}, **{"reward.remote_url": urls})
        assert [server.metric("cme_responses_total") for server in servers] == [8, 8]  # in turns
    for rows in steps:
        assert runs.worst_in_nats(rows, OPENRLHFS) <= 1e-5


def test_the_launcher_refuses_before_anything_starts(rig: Any) -> None:
    flags = runs.flags(rig.folder, **{"algo.advantage.estimator": "rloo"})
    status, output, steps = runs.train(
        rig.folder, rig.ray, [*OURS, *flags], CME_VERIFIER="embedded"
    )
    assert (status, steps) == (1, [])
    assert "rloo is not what per-token cross-model entropy replaces" in output
    assert "RolloutRayActor" not in output


SHARED = """
import ray
from cme_reward.openrlhf.settings import Settings
from cme_reward.openrlhf.verifier import open_verifier

@ray.remote
class Rollouts:
    def __init__(self, **settings):
        self.verifier = open_verifier(Settings(verifier="embedded", **settings))
    def host(self):
        return self.verifier._host._actor_id.hex()
    def ask(self):
        return self.verifier.logprobs([[5]], [[6, 7]])[0].tolist()

ray.init()
one, two = (Rollouts.remote(verifier_gpus=0) for _ in range(2))
other = Rollouts.remote(verifier_gpus=0, verifier_options={"batch_tokens": 999})
hosts = ray.get([actor.host.remote() for actor in (one, two, other)])
assert hosts[0] == hosts[1] != hosts[2], hosts
assert ray.get(one.ask.remote()) == ray.get(two.ask.remote())
alone = Rollouts.remote(verifier_gpus=99, verifier_wait=3, verifier_options={"batch_tokens": 998})
try:
    ray.get(alone.ask.remote())
except Exception as error:
    print(error)
"""


def test_a_verifier_is_shared_or_says_why_it_cannot_be(rig: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARED],
        env=runs.environment(rig.folder, RAY_ADDRESS=rig.ray),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "was not ready after 3 s. It asks Ray for 99 GPUs, of 8 in all" in done.stdout
