"""What the adapter costs at the paper's shapes: `python -m verl_rig.overhead FOLDER`.

From tests/support/. veRL's real trainer on 16 prompts x 8 responses x 2,048 tokens of English, its
processes sampled by py-spy (`pip install py-spy`) from the end of the first step on. The adapter's
are all samples of the process that holds the verifier but those in its forward passes, and in other
processes the samples whose innermost frame of cme_reward or veRL is cme_reward's.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

RATE = 20  # samples a second; py-spy falls behind with many more, Ray has twenty processes
STEPS = 3
PACKAGE = re.compile(r"(?:^|[ (/])(cme_reward|verl)/")
FORWARD = "(cme_reward/verifiers/hf.py:"
# py-spy takes some threads that wait for work for busy ones.
WAITING = re.compile(
    r"^(_worker \(concurrent/futures/thread|Worker\.main_loop \(ray|Condition\.wait \(threading|"
    r"\w+\.select \(selectors)"
)


def seconds_by_process(lines: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The adapter's and all busy seconds of each kind of process, from py-spy's raw format."""
    adapter: defaultdict[str, float] = defaultdict(float)
    busy: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        stack, _, n = line.rstrip().rpartition(" ")
        seconds = int(n) / RATE
        # A process comes after its parents.
        whole = [frame for frame in stack.split(";") if frame]
        processes = [frame for frame in whole if frame.startswith("process ")]
        frames = [frame for frame in whole if not frame.startswith("process ")]
        if not frames or WAITING.match(frames[-1]):
            continue
        actor = re.search(r"ray::(\w+)", processes[-1])
        kind = actor[1] if actor else "other"
        busy[kind] += seconds
        if any(FORWARD in frame for frame in frames):
            continue
        inner = next((m[1] for frame in reversed(frames) if (m := PACKAGE.search(frame))), "")
        if kind == "Scorer" or inner == "cme_reward":
            adapter[kind] += seconds
    return adapter, busy


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
    os.environ["VERL_RIG_SCRIPTED"] = "1"
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
    adapter, busy = seconds_by_process(raw.read_text().splitlines())
    report = {
        "steps": len(logged),
        "responses_a_step": logged[-1]["cme/responses"],
        "tokens_a_response": logged[-1]["response_length/mean"],
        "step_seconds": round(steps / len(logged), 1),
        "busy_seconds_a_step": {k: round(s / len(logged), 1) for k, s in busy.items()},
        "adapter_seconds_a_step": {k: round(s / len(logged), 2) for k, s in adapter.items()},
        "adapter_of_step_time": round(sum(adapter.values()) / steps, 4),
        "timing": {k: round(v, 1) for k, v in logged[-1].items() if k.startswith("timing_s/")},
    }
    print(json.dumps(report, indent=1))
    return done.status


if __name__ == "__main__":
    sys.exit(main())
