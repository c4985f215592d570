"""Which of several conditions is better, by differences paired by seed and corrected for how many
were asked about.

An interval of `1 - 0.05 / n` for n comparisons (Bonferroni): all of them hold at once with 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.miniature.evaluate import interval
from benchmarks.miniature.runs import World, runs_of

MEASURES = {"harder": "sampled"}
"""What a group's comparisons are about, if not greedy accuracy: of the long answers the accuracy at
temperature 1, since even the verifier's likeliest story says a sentence twice."""
SMALL = 0.02
"""A difference of accuracy that nobody needs to care for."""
PAIRS = {
    "horizon": (
        ("sequence", "token"),
        ("return", "token"),
        ("token, policy baseline", "token"),
        ("return, policy baseline", "token"),
        ("sequence, policy baseline", "token"),
        ("return", "sequence"),
        ("return, policy baseline", "return"),
        ("token, EOS masked", "token"),
        ("token, eps 1e-4", "token"),
        ("token, not divided", "token"),
        ("token, white space kept", "token"),
        ("sequence", "token, white space kept"),
    ),
    "screen": (
        ("sequence", "token"),
        ("return", "token"),
        ("token, power 0.5", "token"),
        ("token, contrast 0.5", "token"),
        ("token, power 0.5, contrast 0.5", "token"),
        ("token, divided by the batch's deviation", "token"),
        ("token, gated by the response", "token"),
        ("token, half of the sequence's", "token"),
        ("sequence, soft minimum", "sequence"),
        ("sequence, power 0.5", "sequence"),
        ("return, gamma 0.9", "return"),
        ("return, gamma 0.5", "return"),
        ("return, divided per position", "return"),
        ("return, power 0.5", "return"),
        ("return, contrast 0.5", "return"),
        ("return, EOS masked", "return"),
        ("return, policy baseline", "return"),
        ("return, policy baseline, white space kept", "return, policy baseline"),
    ),
    "claims": (
        ("sequence", "token"),
        ("token, EOS masked", "token"),
        ("token, eps 1e-4", "token"),
        ("token, not divided", "token"),
        ("token, policy baseline", "token"),
    ),
    "harder": (
        ("sequence", "token"),
        ("return", "token"),
        ("return", "sequence"),
        ("return, policy baseline", "return"),
        ("return, policy baseline", "token"),
        ("sequence", "oracle"),
        ("sequence", "random verifier, sequence"),
        ("sequence, policy baseline", "sequence"),
        ("token, policy baseline", "token"),
        ("token, white space kept", "token"),
        ("return, white space kept, policy baseline", "return, policy baseline"),
        ("return, gamma 0.95", "return"),
        ("return, gamma 0.95, policy baseline", "return, policy baseline"),
        ("return, centred", "return"),
        ("return, centred", "sequence"),
        ("return, centred, policy baseline", "return, policy baseline"),
        ("return, centred, policy baseline", "sequence"),
        ("token, half of the sequence's", "token"),
        ("token, gated by the response", "token"),
        ("token, power 0.5", "token"),
        ("token, contrast 0.5", "token"),
        ("sequence, soft minimum", "sequence"),
        ("sequence, three verifiers", "sequence"),
        ("sequence, three verifiers minus deviation", "sequence, three verifiers"),
        ("sequence, minus half a weaker one", "sequence"),
        ("token, white space kept, policy baseline", "token, white space kept"),
        (
            "token, white space kept, policy baseline, early tokens more",
            "token, white space kept, policy baseline",
        ),
        ("sequence, half of the prompts", "sequence"),
        ("sequence, rescaled by length", "sequence"),
        ("sequence", "TTRL"),
        ("Evol-RL", "TTRL"),
        ("sequence, KL 0.01", "sequence"),
        ("sequence, KL 0.1", "sequence"),
        ("token, white space kept, KL 0.1", "token, white space kept"),
        ("token, white space kept", "sequence"),
        ("1,000 updates, token, white space kept", "1,000 updates, token"),
        ("1,000 updates, sequence", "1,000 updates, token"),
        ("1,000 updates, sequence", "1,000 updates, token, white space kept"),
        ("1,000 updates, sequence, policy baseline", "1,000 updates, sequence"),
    ),
}
"""What is compared with what, in each group: named before their runs."""


@dataclass(frozen=True)
class Decision:
    ours: str
    theirs: str
    seeds: int
    end: tuple[float, float]
    """Accuracy at the end, ours minus theirs: mean and half of the corrected interval."""
    area: tuple[float, float]
    """The same of the mean accuracy over the run."""
    drift: tuple[float, float]
    """The same of the drop from a run's best accuracy to its last; less is better."""

    @property
    def verdict(self) -> str:
        mean, half = self.end
        if half != half:
            return "one seed"
        if abs(mean) > half:
            return "better" if mean > 0 else "worse"
        bound = abs(mean) + half
        return "no difference" if bound <= SMALL else f"no difference larger than {bound:.2f}"


def decisions(world: World, group: str) -> list[Decision]:
    """The comparisons of a group whose runs are there, corrected for how many the group has."""
    pairs = PAIRS[group]
    found = []
    for ours, theirs in pairs:
        first, second = (
            {run["seed"]: run for run in runs_of(world, f"{group}: {name}")}
            for name in (ours, theirs)
        )
        shared = sorted(first.keys() & second.keys())
        if shared:
            key = MEASURES.get(group, "accuracy")
            values = [
                [value(first[s], key) - value(second[s], key) for s in shared]
                for value in (end, area, drift)
            ]
            intervals = [interval(row, 1 - 0.05 / len(pairs)) for row in values]
            found.append(Decision(ours, theirs, len(shared), *intervals))
    return found


def end(run: dict[str, Any], key: str = "accuracy") -> float:
    return run["curve"][-1][key]


def area(run: dict[str, Any], key: str = "accuracy") -> float:
    """Mean accuracy over the updates, between measurements a straight line."""
    curve = run["curve"]
    total = sum((b["step"] - a["step"]) * (a[key] + b[key]) / 2 for a, b in pairwise(curve))
    return total / (curve[-1]["step"] - curve[0]["step"])


def drift(run: dict[str, Any], key: str = "accuracy") -> float:
    return best(run, key) - end(run, key)


def best(run: dict[str, Any], key: str = "accuracy") -> float:
    return max(point[key] for point in run["curve"])
