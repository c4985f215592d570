"""What the adapter costs at the paper's shapes: `python -m verl_rig.overhead FOLDER`, from tests/.

veRL's real trainer on 16 prompts x 8 responses x 2,048 tokens, all of its processes sampled by
py-spy (`pip install py-spy`) from the end of the first step on. Rollouts are random ids, and the
verifier answers without a forward pass. The adapter's are all samples of the process that holds the
verifier, and in other processes those whose innermost frame of cme_reward or veRL is cme_reward's.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

RATE = 100  # samples a second
STEPS = 3
PACKAGE = re.compile(r"(?:^|[ (/])(cme_reward|verl)/")
VERIFIER = "(verl_rig/overhead.py:"
# py-spy takes a thread that waits for work of a C queue for a busy one.
WAITING = re.compile(r"^_worker \(concurrent/futures/thread.py:\d+\)$")


class InstantVerifier:
    """The embedded model's tokenizer, and log-probs that cost nothing."""

    def __init__(self, spec: str, **options: Any) -> None:
        from transformers import AutoTokenizer

        from verl_rig.naive import EMBEDDED

        self.name = f"instant:{spec}"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(EMBEDDED)
        self.max_length = 100_000
        self.vocab_size = len(self.tokenizer)

    def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
        return [np.full(len(response), -1.5, np.float32) for response in responses]


def adapter_samples(lines: Iterable[str]) -> tuple[Counter[str], int]:
    """Samples of the adapter by process, and of everything, from py-spy's raw format."""
    ours: Counter[str] = Counter()
    total = 0
    for line in lines:
        stack, _, n = line.rstrip().rpartition(" ")
        process, *frames = stack.split(";")
        if not frames or WAITING.match(frames[-1]):
            continue
        total += int(n)
        if any(VERIFIER in frame for frame in frames):
            continue
        inner = next((m[1] for frame in reversed(frames) if (m := PACKAGE.search(frame))), "")
        if "ray::Scorer" in process or inner == "cme_reward":
            kind = re.search(r"ray::(\w+)", process)
            ours[kind[1] if kind else "driver"] += int(n)
    return ours, total


def main() -> int:
    from verl_rig.models import make_policy, make_prompts
    from verl_rig.run import finish, settings, start

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    policy = make_policy(folder / "policy", max_length=4096)
    data = make_prompts(folder / "prompts.parquet", n=16)
    config = {
        "reward_fn": "cme_reward.verl:CMEReward",
        "cme": {"verifier": "embedded"},
        **settings(policy, data, STEPS),
        "data.train_batch_size": 16,
        "data.max_response_length": 2048,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
    }
    os.environ |= {"VERL_RIG_SCRIPTED": "1", "VERL_RIG_OVERHEAD": "1"}
    process = start(folder / "run", config)
    log, raw = folder / "run" / "log.txt", folder / "profile.txt"
    while process.poll() is None and "step:1 -" not in log.read_text():
        time.sleep(1)
    spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--subprocesses"]
    options = [f"--pid={process.pid}", f"--rate={RATE}", "--format=raw", f"--output={raw}"]
    profiler = subprocess.Popen([*spy, *options])
    done = finish(process, folder / "run", seconds=3000)
    profiler.wait(120)
    logged = done.steps()[1:]
    steps = sum(step["timing_s/step"] for step in logged)
    ours, total = adapter_samples(raw.read_text().splitlines())
    report = {
        "steps": len(logged),
        "responses_and_tokens_a_step": [logged[-1]["cme/responses"], 128 * 2048],
        "step_seconds": round(steps / len(logged), 2),
        "busy_seconds_a_step": round(total / RATE / len(logged), 2),
        "adapter_seconds_a_step": {
            name: round(n / RATE / len(logged), 3) for name, n in ours.most_common()
        },
        "share_of_step_time": round(sum(ours.values()) / RATE / steps, 5),
        "share_of_busy_time": round(sum(ours.values()) / total, 5),
        "timing": {k: round(v, 2) for k, v in logged[-1].items() if k.startswith("timing_s/")},
    }
    print(json.dumps(report, indent=1))
    return done.status


if __name__ == "__main__":
    sys.exit(main())
