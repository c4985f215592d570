"""Ten steps of veRL's trainer with two real models, where `python -m benchmarks.real.models` has
fetched them. Run by name, in a quarter of an hour on two cores and 17 GB:

`nox -s verl -- tests/frameworks/verl/real_models.py -s -o faulthandler_timeout=3600`
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import real_pair
from transformers import AutoTokenizer
from verl_rig import naive
from verl_rig.record import read
from verl_rig.run import finish, settings, start

STEPS, PROMPTS, ROLLOUTS = 10, 2, 4
PARTS = {
    "whole": "timing_s/step",
    "rollout": "timing_s/gen",
    "verifier": "cme/verifier_seconds",
    "alignment": "cme/alignment_seconds",
    "log-probs again": "timing_s/old_log_prob",
    "update": "timing_s/update_actor",
    "weights to the engine": "timing_s/update_weights",
}


@pytest.mark.skipif(not real_pair.there(), reason=real_pair.NEEDED)
def test_ten_steps(tmp_path: Path) -> None:
    policy = real_pair.make_policy(tmp_path / "policy")
    rows = [
        {
            "data_source": "questions",
            "prompt": [{"role": "user", "content": question}],
            "ability": "text",
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": k, "split": "train"},
        }
        for k, question in enumerate(real_pair.QUESTIONS)
    ]
    data = tmp_path / "prompts.parquet"
    pandas.DataFrame(rows).to_parquet(data)
    config: dict[str, Any] = {
        "reward_fn": "cme_reward.verl:CMEReward",
        # float64, so that one forward pass is another to 1e-5.
        "cme": {
            "verifier": f"hf:{real_pair.VERIFIER}",
            "verifier_options": {"dtype": "float64"},
        },
        **settings(policy, data, STEPS),
        "data.train_batch_size": PROMPTS,
        "data.max_response_length": 16,
        "actor_rollout_ref.rollout.n": ROLLOUTS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.actor.optim.lr": 3e-6,
        "+ray_kwargs.ray_init.object_store_memory": 4_000_000_000,
    }
    began = time.perf_counter()
    with real_pair.watched(str(tmp_path / "run" / "record")) as memory:
        done = finish(start(tmp_path / "run", config), tmp_path / "run", seconds=3600)
    assert done.status == 0, done.log[-6000:]
    logged = done.steps()
    assert len(logged) == STEPS

    writer: Any = AutoTokenizer.from_pretrained(policy)
    calls = read(done.record)
    assert sum(len(call["rows"]["responses"]) for call in calls) == STEPS * PROMPTS * ROLLOUTS

    def score(question: str, ids: list[int], sampled: list[int]) -> tuple[np.ndarray, np.ndarray]:
        assert all(sampled)
        rewards, _ = real_pair.scores(question, writer, ids)
        mask = np.array([reward is not None for reward in rewards])
        return np.array([reward or 0.0 for reward in rewards]), mask

    def question(policy: Any, prompt_ids: Any) -> str:
        return real_pair.question_of(policy.decode(prompt_ids))

    rows_per_step = PROMPTS * ROLLOUTS
    worst = naive.largest_difference(calls, rows_per_step, writer, score, content=question)
    parts = {name: [step[key] for step in logged] for name, key in PARTS.items()}
    real_pair.show("veRL", memory, parts, worst, began)
    assert worst <= 1e-5
