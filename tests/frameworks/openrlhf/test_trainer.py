"""`openrlhf.cli.train_ppo_ray` itself, on the CPU: its advantages against a recomputation."""

# pyright: reportMissingImports=false
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs

from cme_reward import CMEConfig

ADAPTERS = Path(__file__).parent.parent.parent.parent / "adapters" / "openrlhf"
OURS, STOCK = "cme_reward.openrlhf", "openrlhf.cli.train_ppo_ray"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("rig")
    runs.save_policy(folder / "policy")
    runs.save_prompts(folder / "prompts.jsonl")
    with runs.cluster(folder) as address:
        yield SimpleNamespace(folder=folder, ray=address["ray"])


def train(rig: Any, command: str, settings: dict[str, str], **changes: Any) -> list[list[Any]]:
    """Train two steps; what the trainer's experience maker returned in each."""
    status, output, steps = runs.train(
        rig.folder, rig.ray, [command, *runs.flags(rig.folder, **changes)], **settings
    )
    assert status == 0, output[-6000:]
    assert [len(rows) for rows in steps] == [8, 8]
    for rows in steps:
        lengths = {len(row["ids"]) for row in rows}
        assert len(lengths) > 1
        assert max(abs(a) for row in rows for a in row["advantages"]) > 0.3
    return steps


def test_token_level_with_all_that_openrlhf_adds(rig: Any) -> None:
    """The package's own agent; a KL penalty, a length penalty and clipping."""
    steps = train(
        rig,
        OURS,
        {"CME_VERIFIER": "embedded"},
        **{
            "algo.kl.init_coef": 0.05,
            "reward.overlong_buffer_len": 8,
            "reward.overlong_penalty_factor": 2.0,
            "reward.clip_range": (-1.2, 1.3),
        },
    )

    def penalty(row: Any) -> float:
        return -2.0 * max(len(row["ids"]) - 4, 0) / 8

    for rows in steps:
        want = runs.expected_advantages(
            rows, CMEConfig(), beta=0.05, limits=(-1.2, 1.3), penalty=penalty
        )
        assert runs.worst_error(rows, want) <= 1e-5
        assert all(0 < row["info"]["score"] < 1 for row in rows)
        assert all(row["info"]["cme/coverage"] == 1 for row in rows)
        assert {row["info"]["cme/credited"] > 0.5 for row in rows} >= {True}
    # The second step is off the reference policy.
    assert max(abs(k) for row in steps[1] for k in row["kl"]) > 0


def test_token_level_trained_while_generating(rig: Any) -> None:
    """Another actor trains then; labels carry the messages; settings are in a file."""
    file = rig.folder / "settings.yaml"
    file.write_text("verifier: embedded\ncme:\n  eps: 0.05\n", encoding="utf-8")
    steps = train(
        rig,
        OURS,
        {"CME_SETTINGS": str(file)},
        **{
            "train.async_enable": True,
            "train.agent_func_path": ADAPTERS / "agent.py",
            "data.label_key": "conversation",
        },
    )
    for rows in steps:
        want = runs.expected_advantages(rows, CMEConfig(eps=0.05))
        assert runs.worst_error(rows, want) <= 1e-5


OPENRLHFS = CMEConfig(level="sequence", eps=1e-9)  # how OpenRLHF itself normalises


def test_sequence_level_through_the_file(rig: Any) -> None:
    file = str(ADAPTERS / "reward_func.py")
    steps = train(rig, OURS, {"CME_VERIFIER": "embedded"}, **{"reward.remote_url": file})
    for rows in steps:
        assert runs.worst_error(rows, runs.expected_advantages(rows, OPENRLHFS)) <= 1e-5
        assert all(0 < row["info"]["score"] < 1 for row in rows)


def test_sequence_level_through_two_servers(rig: Any) -> None:
    """OpenRLHF as it is, this package in the servers alone."""
    settings = {"CME_VERIFIER": "embedded", "CME_GENERATOR_TOKENIZER": str(rig.folder / "policy")}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(runs.HERE / "http_reward.py")],
                    env=runs.environment(rig.folder, **settings),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        ports = [int(server.stdout.readline()) for server in servers if server.stdout]
        urls = ",".join(f"http://127.0.0.1:{port}/get_reward" for port in ports)
        steps = train(rig, STOCK, {}, **{"reward.remote_url": urls})
        answered = [server.communicate("\n")[0].count("answered 1") for server in servers]
    assert sorted(answered) == [8, 8]  # in turns
    for rows in steps:
        assert runs.worst_error(rows, runs.expected_advantages(rows, OPENRLHFS)) <= 1e-5


def test_the_launcher_refuses_before_anything_starts(rig: Any) -> None:
    flags = runs.flags(rig.folder, **{"algo.advantage.estimator": "rloo"})
    status, output, steps = runs.train(rig.folder, rig.ray, [OURS, *flags], CME_VERIFIER="embedded")
    assert (status, steps) == (1, [])
    assert "rloo is not what per-token cross-model entropy replaces" in output
    assert "RolloutRayActor" not in output
