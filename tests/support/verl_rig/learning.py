"""Does the policy learn? `python -m verl_rig.learning FOLDER [SPEC] [STEPS] [KEY=VALUE ...]`.

From tests/support/. Trains the tiny policy on one verifier in veRL's real trainer, then lets the
embedded verifier read the rollouts of every step: a curve that runs with different verifiers
share. Seeds are fixed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from cme_reward import CMEConfig, CrossModelEntropy, load_verifier
from verl_rig.models import make_policy, make_prompts
from verl_rig.naive import content_of
from verl_rig.record import read
from verl_rig.run import Run, finish, settings, start

PROMPTS, ROLLOUTS = 4, 8


def train(folder: Path, verifier: str, steps: int, overrides: list[str]) -> Run:
    policy = make_policy(folder / "policy")
    data = make_prompts(folder / "prompts.parquet")
    config: dict[str, Any] = {
        "reward_fn": "cme_reward.verl:CMEReward",
        "cme": {"verifier": verifier},
        **settings(policy, data, steps),
        "data.train_batch_size": PROMPTS,
        "actor_rollout_ref.rollout.n": ROLLOUTS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 16,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 16,
        "actor_rollout_ref.actor.optim.lr": 3e-3,
    }
    return finish(start(folder / "run", config, overrides), folder / "run", seconds=3000)


def curve(folder: Path, record: Path) -> list[dict[str, float]]:
    """Step by step, what the embedded verifier makes of the rollouts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    scorer = CrossModelEntropy(load_verifier("embedded"), tokenizer, CMEConfig())
    rows = [
        (prompt, ids)
        for call in read(record)
        for prompt, ids in zip(call["rows"]["prompts"], call["rows"]["responses"], strict=True)
    ]
    out = []
    for first in range(0, len(rows), PROMPTS * ROLLOUTS):
        step = rows[first : first + PROMPTS * ROLLOUTS]
        prompts = [content_of(tokenizer, prompt) for prompt, _ in step]
        ids = [[i if i < len(tokenizer) else 0 for i in row.tolist()] for _, row in step]
        batch = scorer(prompts, ids)
        keys = ("token_reward_mean", "sequence_reward_mean", "repetition")
        length = float(np.mean([len(row) for row in ids]))
        out.append({**{key: round(batch.metrics[key], 3) for key in keys}, "length": length})
    return out


def main() -> int:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    verifier = sys.argv[2] if len(sys.argv) > 2 else "embedded"
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 40
    done = train(folder, verifier, steps, sys.argv[4:])
    found = curve(folder, folder / "run" / "record")
    own = [
        {key: step[f"cme/{key}"] for key in ("token_reward_mean", "sequence_reward_mean")}
        for step in done.steps()
    ]
    for number, (judged, logged) in enumerate(zip(found, own, strict=True), 1):
        print(json.dumps({"step": number, **judged, "own": logged}))
    return done.status


if __name__ == "__main__":
    sys.exit(main())
