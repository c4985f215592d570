"""Ten steps of OpenRLHF's trainer with two real models, where `python -m benchmarks.real.models`
has fetched them. Run by name, in a quarter of an hour on two cores:

`nox -s openrlhf -- tests/frameworks/openrlhf/real_models.py -s -o faulthandler_timeout=3600`
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ast
import itertools
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import real_pair
import runs
from transformers import AutoTokenizer

from cme_reward import CMEConfig

STEPS = 10
PARTS = {
    "whole": "timing/step_total",
    "rollout and reward": "timing/generation",
    "log-probs and advantages": "timing/make_experience",
    "update": "timing/ppo_train",
    "weights to the engine": "timing/broadcast",
}


@pytest.mark.skipif(not real_pair.there(), reason=real_pair.NEEDED)
def test_ten_steps(tmp_path: Path) -> None:
    policy = real_pair.make_policy(tmp_path / "policy")
    questions = itertools.islice(itertools.cycle(real_pair.QUESTIONS), 2 * STEPS)
    rows = [{"messages": [{"role": "user", "content": q}], "answer": "5"} for q in questions]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, Any] = {"actor.adam.lr": 3e-6, "rollout.max_new_tokens": 16}
    began = time.perf_counter()
    with (
        real_pair.watched(str(tmp_path)) as memory,
        runs.cluster(tmp_path, RIG_FLOAT32="1") as address,
    ):
        status, output, steps = runs.train(
            tmp_path,
            address["ray"],
            ["cme_reward.openrlhf", *runs.flags(tmp_path, **changes)],
            seconds=3600,
            CME_VERIFIER=f"hf:{real_pair.VERIFIER}",
            # float64, so that one forward pass is another to 1e-5.
            CME_VERIFIER_OPTIONS='{"dtype": "float64"}',
        )
    assert status == 0, output[-6000:]
    assert [len(rows) for rows in steps] == [8] * STEPS

    writer: Any = AutoTokenizer.from_pretrained(policy)

    def score(row: dict[str, Any]) -> tuple[list[float | None], float]:
        question = real_pair.question_of(row["prompt"])
        rewards, logp = real_pair.scores(question, writer, row["ids"])
        return rewards, statistics.fmean(logp)

    worst = max(
        runs.worst_error(rows, runs.expected_advantages(rows, CMEConfig(), score=score))
        for rows in steps
    )
    assert sum(abs(a) > 0.1 for rows in steps for row in rows for a in row["advantages"]) > 100
    logged = [ast.literal_eval(line) for line in re.findall(r"Global step \d+: (\{.*\})", output)]
    assert len(logged) == STEPS
    parts = {name: [step[key] for step in logged] for name, key in PARTS.items()}
    for name in ("verifier", "alignment"):
        seconds = [[row["info"][f"cme/{name}_seconds"] for row in rows] for rows in steps]
        parts[name] = [sum(step) for step in seconds]
    real_pair.show("OpenRLHF", memory, parts, worst, began)
    assert worst <= 1e-5
