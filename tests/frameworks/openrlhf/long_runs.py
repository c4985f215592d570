"""Longer trainings, run by name: `nox -s openrlhf -- tests/frameworks/openrlhf/long_runs.py -s`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from cme_reward import CMEConfig

ADAPTERS = Path(__file__).parent.parent.parent.parent / "adapters" / "openrlhf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs.save_policy(tmp_path / "policy")
    return tmp_path


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_reward_rises(folder: Path, level: str) -> None:
    """24 steps of 32 rollouts; prints the curve."""
    runs.save_prompts(folder / "prompts.jsonl", repeat=24)
    changes: dict[str, Any] = {
        "rollout.batch_size": 4,
        "rollout.n_samples_per_prompt": 8,
        "rollout.micro_batch_size": 8,
        "train.batch_size": 32,
        "train.micro_batch_size": 16,
    }
    if level == "sequence":
        changes["reward.remote_url"] = ADAPTERS / "reward_func.py"
    with runs.cluster(folder) as address:
        started = time.perf_counter()
        status, output, steps = runs.train(
            folder,
            address["ray"],
            ["cme_reward.openrlhf", *runs.flags(folder, **changes)],
            CME_VERIFIER="embedded",
        )
    assert status == 0, output[-6000:]
    assert len(steps) == 24
    means = [statistics.fmean(row["info"]["cme/sequence_reward"] for row in rows) for rows in steps]
    lengths = [statistics.fmean(len(row["ids"]) for row in rows) for rows in steps]
    print(f"\n{level}, {time.perf_counter() - started:.0f} s")
    print("reward", *(f"{mean:.2f}" for mean in means))
    print("length", *(f"{length:.1f}" for length in lengths))
    first, last = statistics.fmean(means[:4]), statistics.fmean(means[-4:])
    print(f"mean of the first four steps {first:.2f}, of the last four {last:.2f}")
    assert last > first + 0.5


def submit(folder: Path, told: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ADAPTERS / "submit.sh"), *runs.flags(folder)],
        env=runs.environment(folder, **told),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def test_ray_job_submit_with_openrlhfs_own_entry(folder: Path) -> None:
    """The hook in the job's runtime environment is all there is to it."""
    runs.save_prompts(folder / "prompts.jsonl")
    with runs.cluster(folder, dashboard=True) as address:
        told = {
            "CME_VERIFIER": "embedded",
            "RAY_API_SERVER_ADDRESS": f"http://{address['dashboard']}",
        }
        done = submit(folder, told)
        for _ in range(20):
            if "No available agent" not in done.stdout:
                break
            time.sleep(5)  # the dashboard's agent takes its time
            done = submit(folder, told)
    assert done.returncode == 0, done.stdout[-6000:]
    steps = runs.read_steps(folder)
    assert len(steps) == 2
    for rows in steps:
        assert runs.worst_error(rows, runs.expected_advantages(rows, CMEConfig())) <= 1e-5
