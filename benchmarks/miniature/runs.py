"""One run: a condition and a seed -> a file of measurements. What is there is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import grpo
from benchmarks.grpo import Settings
from benchmarks.miniature import evaluate, rewards
from benchmarks.miniature.cast import LONG_SCALE, Cast, Scale
from benchmarks.miniature.conditions import Condition
from benchmarks.miniature.environment import Tasks
from benchmarks.miniature.rewards import others
from benchmarks.miniature.tasks import HALVES, TASKS, Example, held_out_set


@dataclass(frozen=True)
class World:
    """Everything that is the same in all conditions."""

    folder: Path
    scale: Scale = field(default_factory=Scale)
    settings: Settings = field(default_factory=Settings)
    questions: int = 35 * len(TASKS)
    steps: float = 1.0
    """Multiplies the steps of every condition."""
    device: str = "cpu"
    long_scale: Scale = LONG_SCALE

    def cast(self, half: str = "short") -> Cast:
        """The models of one half of the tasks."""
        short = half == "short"
        folder = self.folder / ("models" if short else "models-long")
        return Cast(folder, self.scale if short else self.long_scale, self.device, half)

    def test(self, half: str = "short") -> list[Example]:
        """The held-out questions to measure on."""
        return held_out_set(self.questions, tasks=HALVES[half])


def file_name(name: str) -> str:
    """A name without what file systems object to."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def file_of(world: World, name: str, seed: int) -> Path:
    return world.folder / "runs" / f"{file_name(name)}.{seed}.json"


def runs_of(world: World, name: str) -> list[dict[str, Any]]:
    """The runs of a condition that are there, by seed."""
    files = (file_of(world, name, seed) for seed in range(100))
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def run(world: World, condition: Condition, seed: int) -> dict[str, Any]:
    """Train one generator and write its measurements, or read them."""
    file = file_of(world, condition.name, seed)
    if file.is_file():
        return json.loads(file.read_text())
    torch.manual_seed(seed)
    cast = world.cast(condition.half)
    tokenizer = cast.tokenizer(condition.regime)
    test = world.test(condition.half)
    policy = cast.model(condition.regime, seed)
    settings = condition.settings(world.settings)
    settings = Settings(**{**vars(settings), "steps": round(settings.steps * world.steps)})
    wall, cpu = time.perf_counter(), time.process_time()
    if condition.trainer == "trl":
        from benchmarks.miniature.trl_run import train  # seconds to import

        curve = train(policy, tokenizer, condition, cast, settings, test, seed)
    else:
        give = rewards.advantages(condition, cast, policy)
        curve = grpo.train(
            policy, Tasks(tokenizer, test, seed, condition.half), give, settings, seed
        )
    sampled = evaluate.answers(policy, tokenizer, test, seed=seed)
    marks = evaluate.grades(tokenizer, test, sampled)
    result = {
        "condition": condition.name,
        "seed": seed,
        "curve": curve,
        "sampled_accuracy": sum(mark == 1 for mark in marks) / len(marks),
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "examples": examples_of(policy, tokenizer, test),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(file)
    return result


def examples_of(policy: Any, tokenizer: Any, test: Sequence[Any]) -> list[list[str]]:
    """Prompt and greedy response of the first question of each task."""
    first = {e.task: e for e in reversed(test)}
    ids = evaluate.answers(policy, tokenizer, list(first.values()))
    texts = [evaluate.text_of(tokenizer, row) for row in ids]
    return [[e.prompt, text] for e, text in zip(first.values(), texts, strict=True)]


def cast_file(world: World, name: str, seed: int = 0, half: str = "short") -> Path:
    return file_of(world, f"cast-{name}" if half == "short" else f"cast-long-{name}", seed)


def measured(world: World, name: str, seed: int = 0, half: str = "short") -> dict[str, Any]:
    """A model of the cast on the test set, measured once."""
    file = cast_file(world, name, seed, half)
    if not file.is_file():
        cast = world.cast(half)
        found = evaluate.measure(cast.model(name, seed), cast.tokenizer(name), world.test(half))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


Job = tuple[Condition, int]
"""A condition and a seed."""


def run_all(world: World, jobs: Sequence[Job], workers: int) -> None:
    """Train the cast, then run every job, in so many processes."""
    # The long ones last, so that what an interrupted session leaves is worth most.
    jobs = sorted(jobs, key=lambda job: (job[0].steps, job[1]))
    # Tuned models start from others, which have to be there.
    stages = [stage for half in HALVES for stage in _stages(jobs, half)]
    if workers == 0:
        for job in chain(*stages):
            measured(world, *job)
        for count, (condition, seed) in enumerate(jobs, 1):
            _tell(count, len(jobs), run(world, condition, seed))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        for stage in stages:
            for done in as_completed([pool.submit(measured, world, *job) for job in stage]):
                done.result()
        futures = [pool.submit(run, world, *job) for job in jobs]
        for count, done in enumerate(as_completed(futures), 1):
            _tell(count, len(jobs), done.result())


def _stages(jobs: Sequence[Job], half: str) -> list[list[tuple[str, int, str]]]:
    """The models that the jobs of a half need, as what can be trained at once."""
    jobs = [job for job in jobs if job[0].half == half]
    if not jobs:
        return []
    fixed = {(c.verifier, 0) for c, _ in jobs if c.reward in ("cme", "rlme")}
    fixed |= {model for c, _ in jobs for model in others(c)}
    if half == "short":
        fixed |= {("verifier-4", 0), ("reference", 0)}

    def begun_with(*regimes: str) -> list[tuple[str, int]]:
        return [(regimes[0], seed) for seed in sorted({s for c, s in jobs if c.regime in regimes})]

    stages = [
        [*sorted(fixed), *begun_with("pretrained", "sft", "preference")],
        begun_with("sft", "preference"),
        begun_with("preference"),
    ]
    return [[(name, seed, half) for name, seed in stage] for stage in stages]


def _tell(count: int, of: int, result: dict[str, Any]) -> None:
    last = result["curve"][-1]
    print(
        f"{count}/{of} {result['condition']}, seed {result['seed']}: accuracy "
        f"{last['accuracy']:.2f}, length {last['length']:.1f}, {result['cpu_seconds']:.0f} CPU s",
        flush=True,
    )


def _one_thread() -> None:
    torch.set_num_threads(1)
