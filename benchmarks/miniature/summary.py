"""From runs to numbers: means over seeds with confidence intervals, and what they say of claims."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from benchmarks.miniature import decide
from benchmarks.miniature.cast import CAPABILITIES, REGIMES
from benchmarks.miniature.conditions import CONDITIONS, GROUPS
from benchmarks.miniature.evaluate import interval, win_rate
from benchmarks.miniature.runs import World, file_of, runs_of
from benchmarks.miniature.tasks import HALVES

BASES = {"pretrained": "base", "sft": "base, SFT", "preference": "base, preference-tuned"}
LONG_BASE = "base, long answers"
PARTS = ("reverse", "sort", "add", "steps", "say", "short", "long", *HALVES["long"])
"""Tasks, and lengths of letters."""


@dataclass(frozen=True)
class Row:
    """One condition over its seeds; each number is (mean, half-width of the 95 % interval)."""

    name: str
    seeds: list[int]
    accuracy: tuple[float, float]
    best: tuple[float, float]
    """Highest accuracy at any measurement of a run; of long answers that at temperature 1."""
    win_base: tuple[float, float]
    win_reference: tuple[float, float]
    sampled: tuple[float, float]
    length: tuple[float, float]
    stopped: tuple[float, float]
    repetition: tuple[float, float]
    entropy: tuple[float, float]
    distinct: tuple[float, float]
    tasks: dict[str, float]
    """Accuracy by task and by length of the letters."""
    cpu_seconds: float


@dataclass(frozen=True)
class Claim:
    """What the paper says, or a lesson, and what is seen of it here."""

    text: str
    verdict: str
    """"holds", "does not hold" or "undecided"; "not contradicted" where a claim of no difference
    stands."""
    numbers: str


def rows_of(world: World) -> dict[str, Row]:
    """Every condition that was run, the untrained bases and the reference too."""
    reference = _cast(world, "reference")
    rows: dict[str, Row] = {}
    for half, regime in (*product(["short"], REGIMES), ("long", "pretrained")):
        starts = {}
        for c in CONDITIONS.values():
            if (c.half, c.regime) == (half, regime):
                for run in runs_of(world, c.name):
                    starts.setdefault(run["seed"], run["curve"][0])
        if starts:
            as_runs = [
                {
                    "seed": s,
                    "curve": [p],
                    "sampled_accuracy": p.get("sampled", float("nan")),
                    "cpu_seconds": 0.0,
                }
                for s, p in sorted(starts.items())
            ]
            name = BASES[regime] if half == "short" else LONG_BASE
            rows[name] = _row(name, as_runs, reference if half == "short" else None)
    for name, condition in CONDITIONS.items():
        found = runs_of(world, name)
        if found:
            short = condition.half == "short"
            rows[name] = _row(name, found, reference if short else None)
    return rows


def _cast(world: World, name: str) -> dict[str, Any] | None:
    file = file_of(world, f"cast-{name}", 0)
    return json.loads(file.read_text()) if file.is_file() else None


def _row(name: str, runs: Sequence[dict[str, Any]], reference: dict[str, Any] | None) -> Row:
    ends = [run["curve"][-1] for run in runs]
    is_long = HALVES["long"][0] in ends[0]

    def over(value: Callable[[dict[str, Any]], float]) -> tuple[float, float]:
        return interval([value(end) for end in ends])

    return Row(
        name=name,
        seeds=[run["seed"] for run in runs],
        accuracy=over(lambda end: end["accuracy"]),
        best=interval([decide.best(run, "sampled" if is_long else "accuracy") for run in runs]),
        win_base=interval(
            [win_rate(r["curve"][-1]["grades"], r["curve"][0]["grades"]) for r in runs]
        ),
        win_reference=over(
            lambda end: win_rate(end["grades"], reference["grades"]) if reference else float("nan")
        ),
        sampled=interval([run["sampled_accuracy"] for run in runs]),
        length=over(lambda end: end["length"]),
        stopped=over(lambda end: end["stopped"]),
        repetition=over(lambda end: end["repetition"]),
        entropy=over(lambda end: end["entropy"]),
        distinct=over(lambda end: end["distinct"]),
        tasks={p: statistics.mean(e[p] for e in ends) for p in PARTS if all(p in e for e in ends)},
        cpu_seconds=statistics.mean(run["cpu_seconds"] for run in runs),
    )


def claims_of(world: World, rows: dict[str, Row]) -> list[Claim]:
    """The claims that the runs at hand can speak to, one by one.

    "holds" and "does not hold" need a 95 % interval over seeds (Student's t, differences paired by
    seed) that lies on one side; anything else is "undecided".
    """
    claims: list[Claim] = []

    def compare(text: str, ours: str, theirs: str, *, alike: bool = False) -> None:
        """By accuracy at the end, paired by seed; `alike` claims that there is no difference."""
        first = {r["seed"]: r["curve"][-1]["accuracy"] for r in runs_of(world, ours)}
        second = {r["seed"]: r["curve"][-1]["accuracy"] for r in runs_of(world, theirs)}
        shared = sorted(first.keys() & second.keys())
        if shared:
            mean, half = interval([first[s] - second[s] for s in shared])
            numbers = f"{ours} minus {theirs}, accuracy: {signed(mean, half)}"
            verdict = _side(mean, half)
            if alike and half == half:
                verdict = "not contradicted" if verdict == "undecided" else "does not hold"
            claims.append(Claim(text, verdict, numbers))

    def above_half(text: str, name: str) -> None:
        if name in rows:
            mean, half = rows[name].win_base
            numbers = f"{name}, win rate against its base: {plain(mean, half)}"
            claims.append(Claim(text, _side(mean - 0.5, half), numbers))

    above_half("CME beats the base it starts from", "CME, token")
    above_half("so does the sequence reward", "CME, sequence")
    above_half("from a generator tuned on few clean examples", "CME, token, from sft")
    above_half("from a preference-tuned generator", "CME, token, from preference")
    text = "TRL's trainer ends where the loop ends"
    compare(text, "CME, token, in TRL", "CME, token", alike=True)
    for rival in ("RENT", "EM-RL", "INTUITOR", "TTRL", "RLME", "self-verifier, token"):
        compare(f"CME beats {rival}", "CME, token", rival)
    _random_is_lowest(rows, claims)
    _grows(rows, claims)
    compare(
        "another family beats the generator's own, which shares its data",
        "CME, token",
        "CME, token, same-family",
    )
    compare("token level beats sequence level", "CME, token", "CME, sequence")
    compare("subtracting the policy's log-prob helps", "CME, token, policy baseline", "CME, token")
    for kind in ("long", "fast"):
        standard = f"{kind}: token, eps 0.1"
        compare(f"{kind}: eps 0.1 is better than 1e-4", standard, f"{kind}: token, eps 1e-4")
        masked = f"{kind}: token, EOS masked, eps"
        compare(f"{kind}: scoring EOS is better than masking it", standard, f"{masked} 0.1")
        tiny = f"{kind}: token, eps 1e-4"
        compare(f"{kind}: also at eps 1e-4", tiny, f"{masked} 1e-4")
    compare("fast: dividing by the deviation helps", standard, "fast: token, not divided")
    compare("fast: eps 0.1 is better than 1", standard, "fast: token, eps 1")
    for gamma in ("0.9", "1"):
        name = f"fast: token, returns-to-go {gamma}"
        compare(f"fast: returns-to-go with discount {gamma} help", name, standard)
    compare("fast: the sequence level keeps better", "fast: sequence, eps 0.1", standard)
    return claims


def _random_is_lowest(rows: dict[str, Row], claims: list[Claim]) -> None:
    """At the same level, and whatever the level."""
    trained = ["CME, token", *(f"CME, token, {name}" for name in CAPABILITIES[:-1])]
    if not all(name in rows for name in trained):
        return
    low = min(trained, key=lambda name: rows[name].win_base[0])
    for name in ("random verifier, token", "random verifier, sequence"):
        if name in rows:
            ours, theirs = rows[low].win_base[0], rows[name].win_base[0]
            verdict = "holds" if theirs < ours else "does not hold"
            text = f"the {name} level, is below every trained verifier (means)"
            numbers = f"win rate against base: random {theirs:.3f}, {low} {ours:.3f}"
            claims.append(Claim(text, verdict, numbers))


def _grows(rows: dict[str, Row], claims: list[Claim]) -> None:
    names = [f"CME, token, {name}" for name in CAPABILITIES[:-1]] + ["CME, token"]
    if all(name in rows for name in names):
        rates = [rows[name].win_base[0] for name in names]
        grows = all(a < b for a, b in pairwise(rates))
        numbers = "win rate against base: " + ", ".join(f"{rate:.3f}" for rate in rates)
        text = "win rate grows with the verifier's capability (means, four verifiers)"
        claims.append(Claim(text, "holds" if grows else "does not hold", numbers))


def _side(mean: float, half: float) -> str:
    if mean - half > 0:
        return "holds"
    return "does not hold" if mean + half < 0 else "undecided"


def plain(mean: float, half: float) -> str:
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else "")


def signed(mean: float, half: float) -> str:
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if half == half else "")


def summary(world: World) -> dict[str, Any]:
    """All numbers of the report, for `report.json`."""
    rows = rows_of(world)
    names = [n for n in (*CAPABILITIES, "same-family", "same-tokenizer", "reference")]
    cast = {n: found["accuracy"] for n in names if (found := _cast(world, n))}
    ranking = file_of(world, "ranking", 0)
    return {
        "seeds": sorted({s for row in rows.values() for s in row.seeds}),
        "questions": _questions(world, rows),
        "cast": cast,
        "ranking": json.loads(ranking.read_text()) if ranking.is_file() else {},
        "rows": {name: asdict(row) for name, row in rows.items()},
        "groups": {g: [c.name for c in cs if c.name in rows] for g, cs in GROUPS.items()},
        "claims": [asdict(claim) for claim in claims_of(world, rows)],
        "decisions": {
            group: [asdict(d) | {"verdict": d.verdict} for d in decide.decisions(world, group)]
            for group in decide.PAIRS
        },
        "curves": {name: _curves(world, name) for name in CONDITIONS if name in rows},
        "examples": {
            name: runs_of(world, name)[0]["examples"] for name in CONDITIONS if name in rows
        },
    }


def _questions(world: World, rows: dict[str, Row]) -> int:
    runs = next((found for name in rows if (found := runs_of(world, name))), None)
    return len(runs[0]["curve"][0]["grades"]) if runs else 0


def _curves(world: World, name: str) -> list[list[dict[str, Any]]]:
    keep = ("step", "accuracy", "sampled", "length", "stopped", "repetition", "entropy", "distinct")
    return [
        [{key: point[key] for key in keep if key in point} for point in run["curve"]]
        for run in runs_of(world, name)
    ]


def write(world: World, found: dict[str, Any]) -> Path:
    file = world.folder / "report.json"
    file.write_text(json.dumps(found, indent=1))
    return file
