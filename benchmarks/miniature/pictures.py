"""Pictures of the runs, as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.miniature.cast import CAPABILITIES

INK, GRID = "#1f2430", "#d8dce4"
COLOURS = ("#4556af", "#c4572e", "#2c8a5b", "#8a5bb0", "#b08a1e", "#3a8fb0", "#a03a5f", "#6b7280",
           "#1f2859", "#e08f6f", "#7fbf9b", "#c7a3e0")  # fmt: skip
FIRST = {
    "accuracy": "accuracy",
    "sampled": "accuracy of sampled answers",
    "gain": "reward less its first, nats a token",
}
PANELS = (
    ("length", "response length, tokens"),
    ("entropy", "entropy, nats"),
    ("repetition", "repeated 4-grams"),
)
REWARDS = ("CME, token", "CME, sequence", "RLME", "TTRL", "RENT", "EM-RL", "INTUITOR",
           "self-verifier, token", "random verifier, token")  # fmt: skip


def draw_all(found: dict[str, Any], folder: Path) -> list[Path]:
    """Every picture that the runs at hand allow; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    curves = found["curves"]

    def panels(name: str, conditions: Sequence[str], title: str, first: str = "accuracy") -> None:
        here = [c for c in conditions if c in curves]
        if here:
            files.append(folder / f"{name}.png")
            learning_curves({c: curves[c] for c in here}, files[-1], title, first)

    panels("rewards", REWARDS, "Rewards: mean of the seeds, held-out questions, greedy")
    for kind, what in (("long", "Twice the steps"), ("fast", "Three times the learning rate")):
        lessons = [c for c in curves if c.startswith(f"{kind}: ")]
        panels(f"lessons-{kind}", lessons, f"{what}, no cosine")
    horizon = [c for c in curves if c.startswith("horizon: ")]
    panels("horizon", horizon, "Ten times the updates, no cosine: what a token is credited with")
    harder = [c for c in curves if c.startswith("harder: 1,000 updates")]
    title = "Long answers, a middling verifier: what a token is credited with"
    panels("harder", harder, title, "sampled")
    names = [f"CME, token, {name}" for name in CAPABILITIES[:-1]] + ["CME, token"]
    if all(name in found["rows"] for name in names) and all(
        c in found["cast"] for c in CAPABILITIES
    ):
        files.append(folder / "capability.png")
        capability(found, names, files[-1])
    shown = [name for name in found["rows"] if ": " not in name]
    if shown:
        files.append(folder / "win-rates.png")
        win_rates({name: found["rows"][name]["win_base"] for name in shown}, files[-1])
    return files


def learning_curves(
    curves: dict[str, list[list[dict[str, Any]]]],
    file: Path,
    title: str,
    first: str = "accuracy",
) -> None:
    """What `first` names, length, entropy and repetition by step: thin lines seeds, thick ones
    their mean."""
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.4), layout="constrained")
    for axis, (key, label) in zip(axes.flat, [(first, FIRST[first]), *PANELS], strict=True):
        for (name, runs), colour in zip(curves.items(), _colours(len(curves)), strict=True):
            steps = [point["step"] for point in runs[0]]
            values = [[point[key] for point in run] for run in runs]
            for run in values if len(values) > 1 else ():
                axis.plot(steps[: len(run)], run, color=colour, lw=0.6, alpha=0.35)
            mean = [statistics.mean(at) for at in zip(*values, strict=False)]
            axis.plot(
                steps[: len(mean)], mean, color=colour, lw=2, label=name.partition(": ")[2] or name
            )
        # From 0, and never so narrow that noise looks like a trend.
        low, high = axis.get_ylim()
        least = {"accuracy": 1, "sampled": 1, "repetition": 0.1}.get(key, 0)
        axis.set_ylim(low if key == "gain" else 0, max(high, least))
        _dress(axis, "step", label)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, color=INK, fontsize=11)
    _save(figure, file)


def capability(found: dict[str, Any], names: Sequence[str], file: Path) -> None:
    """Win rate against base over the verifier's own accuracy (the paper's Figure 3)."""
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    own = [found["cast"][c] for c in CAPABILITIES]
    rates = [found["rows"][name]["win_base"] for name in names]
    axis.errorbar(
        own,
        [mean for mean, _ in rates],
        [half if half == half else 0 for _, half in rates],
        color=COLOURS[0], marker="o", capsize=3, lw=1.5,
    )  # fmt: skip
    for x, (y, _), name in zip(own, rates, CAPABILITIES, strict=True):
        axis.annotate(name, (x, y), (4, 6), textcoords="offset points", fontsize=8, color=INK)
    random = found["rows"].get("random verifier, token")
    if random:
        axis.axhline(
            random["win_base"][0], color=COLOURS[1], ls="--", lw=1, label="random verifier"
        )
    axis.axhline(0.5, color=INK, lw=0.8, label="base")
    axis.legend(fontsize=8, frameon=False)
    _dress(axis, "the verifier's own accuracy", "win rate against base")
    _save(figure, file)


def win_rates(rates: dict[str, Sequence[float]], file: Path) -> None:
    """Tie-adjusted win rate of each condition against its base, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(6.8, 0.28 * len(rates) + 0.9), layout="constrained")
    for y, (mean, half) in enumerate(reversed(list(rates.values()))):
        colour = COLOURS[0] if mean > 0.5 else COLOURS[1]
        axis.barh(y, mean - 0.5, left=0.5, color=colour, height=0.6, alpha=0.85)
        axis.errorbar(mean, y, xerr=half if half == half else 0, color=INK, capsize=2, lw=1)
    axis.set_yticks(range(len(rates)), list(reversed(rates)), fontsize=8)
    axis.set_xlim(0, 1)
    _dress(axis, "win rate against base, (wins + ties / 2) / N", "")
    _save(figure, file)


def _colours(n: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(n)]


def _dress(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(color=GRID, lw=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: Path) -> None:
    # Without the date and version, so that equal runs give equal bytes.
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)
