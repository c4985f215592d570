"""The in-process verifier against other ways to score the same ids with the same model.

Each variant runs in a process of its own (`verifier_variants.py`), so that peak memory is its own,
on one thread, and reports CPU seconds: other work on the machine does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shape:
    """The fields of `verifier_variants.Shape`."""

    prompt: int
    lengths: tuple[int, ...]
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    prompts: int = 1
    chunk: int | None = None


RAGGED = (300, 287, 251, 204, 178, 133, 96, 41)
SHAPES = {
    # 27.4 million parameters, most of them the head.
    "head-heavy": Shape(256, (256,) * 8, 131_072, 192, 512, 5),
    # 33.7 million parameters; ragged responses to one long prompt.
    "body-heavy": Shape(1000, RAGGED, 16_384, 512, 1376, 8),
    # 7.4 million parameters; four prompts of eight responses each.
    "grouped": Shape(500, RAGGED, 16_384, 256, 688, 4, prompts=4),
}
QUICK = Shape(40, (9, 7, 4, 1), 997, 64, 96, 2, prompts=2)
BASELINES = {
    "naive": "torch",
    "trl": "trl",
    "lm-eval, batches of 8": "lm_eval",
    "lm-eval, batches of 1": "lm_eval",
}
# A small body, so that what the vocabulary costs would show.
GROWING = Shape(64, (128,) * 8, 16_384, 128, 352, 2)
GROWTH = {
    "responses, 8 a prompt": [(n, replace(GROWING, prompts=n // 8)) for n in (8, 16, 32, 64)],
    "tokens a response": [(n, replace(GROWING, lengths=(n,) * 8)) for n in (64, 128, 256, 512)],
    "responses a prompt": [(n, replace(GROWING, lengths=(128,) * n)) for n in (1, 2, 4, 8, 16)],
    # Chunks of 2 million logits, 8 MB, that are full for each of these.
    "vocabulary, equal chunks": [
        (n, replace(GROWING, vocab=n, lengths=(512,) * 8, chunk=2**21))
        for n in (512, 16_384, 262_144)
    ],
    "vocabulary, default options": [(n, replace(GROWING, vocab=n)) for n in (512, 16_384, 262_144)],
}
AGREEMENT = 1e-4
FLAT = 1.2


def measure(shape: Shape, variant: str) -> dict[str, Any]:
    """`verifier_variants.run` in a fresh process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("verifier_variants.py")),
            json.dumps(asdict(shape)),
            variant,
        ],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


Measure = Callable[[Shape, str], dict[str, Any]]
RatioTable = Callable[[str, str, str, str, str], None]


def show(
    row: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    benchmark: Any,
    ratio_table: RatioTable,
) -> None:
    """CPU seconds and extra memory beside the baseline's, each as a row of the table."""
    for label, field, scale, unit in (
        ("CPU", "cpu_seconds", 1, "s"),
        ("extra memory", "extra_bytes", 1e-6, "MB"),
    ):
        benchmark.extra_info[label] = {"ours": ours[field], "baseline": theirs[field]}
        ratio_table(
            "verifier",
            row.format(label),
            f"{ours[field] * scale:.4g} {unit}",
            f"{theirs[field] * scale:.4g} {unit}",
            f"{ours[field] / theirs[field]:.3f}",
        )


@pytest.fixture(scope="module")
def measured() -> Measure:
    """`measure`, once for each shape and variant."""
    return cache(measure)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", SHAPES)
def test_against(
    name: str,
    baseline: str,
    benchmark,
    quick: bool,
    measured: Measure,
    ratio_table: RatioTable,
) -> None:
    if find_spec(BASELINES[baseline]) is None:
        pytest.skip(f"{baseline}: pip install -e '.[bench]'")
    shape = QUICK if quick else SHAPES[name]
    ours = measured(shape, "ours")
    theirs = benchmark.pedantic(measured, args=(shape, baseline), rounds=1)
    tokens = np.tile(shape.lengths, shape.prompts)
    errors = np.abs(np.subtract(ours["sums"], theirs["sums"])) / tokens
    if len(ours["logprobs"]) == len(theirs["logprobs"]):  # lm-eval gives sums only
        errors = np.abs(np.subtract(ours["logprobs"], theirs["logprobs"]))
    assert errors.max() <= AGREEMENT
    benchmark.extra_info["largest_difference"] = float(errors.max())
    if quick:
        return
    wall = {"ours": ours["wall_seconds"], "baseline": theirs["wall_seconds"]}
    benchmark.extra_info["wall"] = wall
    show(f"{name}, {{}}, {baseline}", ours, theirs, benchmark, ratio_table)


@pytest.mark.parametrize("baseline", ["naive", "ours", "ours, singly, none kept"])
def test_rollouts_that_come_singly(
    baseline: str,
    benchmark,
    quick: bool,
    measured: Measure,
    ratio_table: RatioTable,
) -> None:
    """What keeping a prompt between calls is worth."""
    shape = QUICK if quick else SHAPES["body-heavy"]
    ours = measured(shape, "ours, singly")
    theirs = benchmark.pedantic(measured, args=(shape, baseline), rounds=1)
    errors = np.abs(np.subtract(ours["logprobs"], theirs["logprobs"]))
    assert errors.max() <= AGREEMENT
    if quick:
        return
    show(f"body-heavy, one response a call, {{}}, {baseline}", ours, theirs, benchmark, ratio_table)


@pytest.mark.parametrize("what", GROWTH)
def test_growth(
    what: str,
    benchmark,
    quick: bool,
    measured: Measure,
    ratio_table: RatioTable,
) -> None:
    """CPU seconds and extra memory of ours, from the smallest size to the largest."""
    sizes = [(sum(QUICK.lengths), QUICK)] if quick else GROWTH[what]

    def sweep() -> list[dict[str, Any]]:
        return [measured(shape, "ours") for _, shape in sizes]

    results = benchmark.pedantic(sweep, rounds=1)
    memory = [result["extra_bytes"] / 1e6 for result in results]
    seconds = [result["cpu_seconds"] for result in results]
    for result, (_, shape) in zip(results, sizes, strict=True):
        assert len(result["logprobs"]) == shape.prompts * sum(shape.lengths)
        assert np.isfinite(result["logprobs"]).all()
    if quick:
        return
    if what == "vocabulary, equal chunks":
        assert max(memory) <= FLAT * min(memory), memory
    benchmark.extra_info |= {
        "sizes": [size for size, _ in sizes],
        "cpu_seconds": seconds,
        "extra_mb": memory,
    }
    span = f"{sizes[0][0]:,} to {sizes[-1][0]:,}"
    for label, values, unit in (("CPU", seconds, "s"), ("extra memory", memory, "MB")):
        ratio_table(
            "verifier: growth",
            f"{what}, {span}: {label}",
            f"{values[-1]:.4g} {unit}",
            f"{values[0]:.4g} {unit}",
            f"{values[-1] / values[0]:.3f}",
        )
