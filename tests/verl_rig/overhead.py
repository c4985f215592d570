"""What the adapter costs at the paper's shapes: `python -m verl_rig.overhead FOLDER`, from tests/.

veRL's real trainer on 16 prompts x 8 responses x 2,048 tokens. Rollouts are random ids and the
verifier does not count, so that what is left of the reward is the adapter. Measured is CPU time: in
the trainer, of the whole reward worker (an upper bound: unpacking what Ray brings is in it) and of
the estimator; without it, of what the actor and the agent loop worker do with the same rows.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

WHOLE_PROCESS = {"CMEReward": "run_single"}
ROWS, TOKENS = 128, 2048


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


def profile(module: Any) -> None:
    """Wrap what a module of the adapter defines; times go to `VERL_RIG_OVERHEAD`."""
    for name, method in WHOLE_PROCESS.items():
        if name in vars(module) and vars(module)[name].__module__ == module.__name__:
            _wrap_process(vars(module)[name], method)
    if module.__name__.endswith("advantages"):
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as registry

        registry["cme_grpo"] = _timed(module.cme_grpo, "cme_grpo")


def _write(what: str, seconds: float, *, total: bool) -> None:
    path = Path(os.environ["VERL_RIG_OVERHEAD"]) / f"{os.getpid()}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"what": what, "cpu": seconds, "total": total}) + "\n")


def _wrap_process(owner: Any, method: str) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    async def measured(self: Any, *args: Any) -> Any:
        result = await original(self, *args)
        _write(owner.__name__, time.process_time(), total=True)
        return result

    setattr(owner, method, measured)


def _timed(function: Any, what: str) -> Any:
    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _write(what, time.thread_time() - started, total=False)

    return measured


def without_a_trainer(policy: Path) -> dict[str, float]:
    """CPU seconds of the actor's work and of the agent loop worker's notes, for one step.

    Ray starts these processes before the rig can reach into them, so they are called here.
    """
    import asyncio
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from cme_reward import _verl_scorer
    from cme_reward._verl_launch import compose, expand
    from cme_reward._verl_outputs import describe

    _verl_scorer.load_verifier = InstantVerifier  # type: ignore[assignment]
    settings = {
        "reward_fn": "cme_reward.verl:CMEReward",
        "cme": {"verifier": "embedded"},
        "actor_rollout_ref": {"model": {"path": str(policy)}, "rollout": {"name": "hfcpu"}},
    }
    scorer = _verl_scorer.Scorer(compose(expand(settings)))
    assert len(AutoTokenizer.from_pretrained(policy)) > 380
    ids = np.random.default_rng(0).integers(3, 380, (ROWS, TOKENS)).tolist()
    requests = [
        _verl_scorer.Request(
            prompt=[{"role": "user", "content": f"{i // 8} plus 1 equals"}],
            ids=row,
            mask=[1] * TOKENS,
        )
        for i, row in enumerate(ids)
    ]

    async def score(some: Any) -> None:
        await asyncio.gather(*(scorer.score(request) for request in some))

    asyncio.run(score(requests[:8]))
    started = time.process_time()
    asyncio.run(score(requests))
    scored = time.process_time()
    for row in ids:
        output = SimpleNamespace(
            prompt_ids=[1] * 30,
            response_ids=row,
            response_mask=[1] * TOKENS,
            response_logprobs=None,
            multi_modal_data=None,
            extra_fields={},
        )
        json.dumps(describe([output], validate=False, logprobs=False))
    return {"Scorer": scored - started, "CMEAgentLoopWorker": time.process_time() - scored}


def main() -> int:
    from verl_rig.models import make_policy, make_prompts
    from verl_rig.run import finish, settings, start

    folder, steps = Path(sys.argv[1]), 4
    times = folder / "times"
    times.mkdir(parents=True)
    policy = make_policy(folder / "policy", max_length=4096)
    data = make_prompts(folder / "prompts.parquet", n=16)
    config = {
        "reward_fn": "cme_reward.verl:CMEReward",
        "cme": {"verifier": "embedded"},
        **settings(policy, data, steps),
        "data.train_batch_size": 16,
        "data.max_response_length": 2048,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
    }
    os.environ |= {"VERL_RIG_SCRIPTED": "1", "VERL_RIG_OVERHEAD": str(times)}
    done = finish(start(folder / "run", config), folder / "run", seconds=3000)
    seconds: dict[str, float] = defaultdict(float)
    for path in times.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if not row["total"]:
                seconds[row["what"]] += row["cpu"] / steps
        for what in {row["what"] for row in rows if row["total"]}:
            totals = [row["cpu"] for row in rows if row["what"] == what]
            # The first entry comes after the imports and the first response's work.
            seconds[what] += (totals[-1] - totals[0]) / ((len(totals) - 1) / ROWS)
    seconds |= without_a_trainer(policy)
    logged = done.steps()[1:]
    step = float(np.mean([s["timing_s/step"] for s in logged]))
    total = sum(seconds.values())
    report = {
        "cpu_seconds_a_step": {what: round(value, 4) for what, value in sorted(seconds.items())},
        "adapter_seconds": round(total, 3),
        "step_seconds": round(step, 2),
        "share": round(total / step, 5),
        "alignment_seconds": [round(s["cme/alignment_seconds"], 3) for s in logged],
        "tokens": [s["response_length/mean"] * s["cme/responses"] for s in logged],
        "timing": {k: round(v, 2) for k, v in logged[-1].items() if k.startswith("timing_s/")},
    }
    print(json.dumps(report, indent=1))
    return done.status


if __name__ == "__main__":
    sys.exit(main())
