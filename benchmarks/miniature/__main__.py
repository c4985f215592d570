"""Regenerate everything: `python -m benchmarks.miniature`. See docs/evidence.md."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.grpo import Settings
from benchmarks.miniature import ranking, report
from benchmarks.miniature.cast import Scale
from benchmarks.miniature.conditions import CONDITIONS, GROUPS, STUDY
from benchmarks.miniature.models import Size
from benchmarks.miniature.runs import Job, World, run_all

SMALL = Scale(
    generator=Size(16, 1),
    verifiers=(Size(16, 1),) * 4,
    verifier_steps=(2,) * 4,
    generator_steps=2,
    reference_steps=2,
    batch=8,
)
LARGE = Scale(
    generator=Size(192, 4),
    verifiers=(Size(32, 1), Size(96, 3), Size(192, 4), Size(384, 6)),
    verifier_steps=(300, 1000, 3000, 6000),
    generator_steps=4000,
    reference_steps=4000,
    batch=256,
)


def world_of(given: argparse.Namespace) -> World:
    if given.smoke:
        few = Settings(prompts=2, rollouts=4)
        return World(given.out, SMALL, few, questions=10, steps=0.02, long_scale=SMALL)
    if given.large:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return World(given.out, LARGE, Settings(prompts=16), device=device, long_scale=LARGE)
    return World(given.out)


def is_meant(text: str, name: str) -> bool:
    """Is this the condition of that name? If none has it: does its name hold the text?"""
    return text == name if text in CONDITIONS else text in name


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """Every condition that is meant, with each of its seeds."""
    groups = given.group or [g for g in GROUPS if given.study or g not in STUDY]
    return [
        (condition, seed)
        for group in groups
        for condition in GROUPS[group]
        if not given.only or any(is_meant(text, condition.name) for text in given.only)
        for seed in range(condition.seeds if given.seeds is None else given.seeds)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("miniature-output"), help="folder; runs in it are kept")
    add("--workers", type=int, default=2, help="processes of one thread each; 0: in this one")
    add("--seeds", type=int, help="of every condition; default: as many as the study has")
    study = "all groups, also those that take hours: three in two processes, kept when interrupted"
    add("--study", action="store_true", help=study)
    only = f"only these conditions; {', '.join(STUDY)} only so, or with --study"
    add("--group", action="append", choices=GROUPS, help=only)
    only = "only the condition of this name, or those with TEXT in their name"
    add("--only", action="append", metavar="TEXT", help=only)
    add("--smoke", action="store_true", help="untrained toys, a minute: does it run at all?")
    add("--large", action="store_true", help="larger models, on a GPU where there is one")
    add("--report-only", action="store_true", help="write the report from the runs that are there")
    given = parser.parse_args(arguments)
    world = world_of(given)
    started = time.perf_counter()
    jobs = jobs_of(given)
    if not given.report_only:
        run_all(world, jobs, given.workers)
        if not given.group and not given.only:
            ranking.rank(world)
    page = report.write(world)
    print(f"{page}: the report")
    count = len({condition.name for condition, _ in jobs})
    print(f"{count} of {len(CONDITIONS)} conditions, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
