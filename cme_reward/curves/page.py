"""A run, or two over each other, as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cme_reward.curves.read import Run, Series
from cme_reward.curves.samples import Sample, shown
from cme_reward.curves.signs import CUT_OFF, ENTROPY, LENGTH, ends, signs
from cme_reward.curves.tokens import LEAST, extremes
from cme_reward.heatmap.pages import document, template
from cme_reward.heatmap.render import render_html
from cme_reward.metrics import METRICS, OF_TRAINERS

WIDTH, HEIGHT = 300, 110
BINS = 300
"""Most points of a line; of more steps, mean and range of as many neighbours each are drawn."""


@dataclass(frozen=True)
class Line:
    """A run's metric in a chart, as SVG's points."""

    mean: str
    band: str
    """Lowest and highest of each point's steps; empty where a point is a step."""
    first: float
    last: float


@dataclass(frozen=True)
class Chart:
    name: str
    says: str
    """What the metric means; empty where it is not one of ours."""
    worry: str
    """When to worry, where that is known."""
    lines: list[Line | None]
    low: float
    high: float
    to: float
    """The last step."""


def render(runs: Sequence[Run], samples: Sequence[Sequence[Sample]] = ()) -> str:
    """The page, which needs no network: signs first, metrics of CME and of the policy's health,
    all others, and of each run's samples, where there are any, the tokens rewarded most and least
    and heat maps."""
    names = sorted({name for run in runs for name in run.series})
    ours = [name for name in names if _of_interest(name)]
    title = " and ".join(run.name for run in runs)
    views = shown(_told_apart(runs, samples))
    found = template("cme_reward.curves", short=_short, nats=_nats, whole="{:,.0f}".format).render(
        runs=[
            (run.name, signs(run), max(s.steps[-1] for s in run.series.values())) for run in runs
        ],
        ours=[chart(name, runs) for name in ours],
        others=[chart(name, runs) for name in names if name not in ours],
        width=WIDTH,
        height=HEIGHT,
        samples=bool(views),
        extremes=[(run.name, extremes(those)) for run, those in zip(runs, samples, strict=False)],
        least=LEAST,
    )
    if not views:
        return document(title, found)
    return render_html(views, title=title, above=found, in_order=True)


def _told_apart(runs: Sequence[Run], samples: Sequence[Sequence[Sample]]) -> list[Sample]:
    """All samples, by steps; of two runs with the run's name."""
    named = [
        replace(one, view=replace(one.view, label=f"{run.name}, {one.view.label}"))
        if len(runs) > 1
        else one
        for run, those in zip(runs, samples, strict=False)
        for one in those
    ]
    return sorted(named, key=lambda one: one.step)


def chart(name: str, runs: Sequence[Run]) -> Chart:
    """One metric of all runs, on the same axes."""
    there = [run.series.get(name) for run in runs]
    known = [series for series in there if series is not None]
    low = min(float(series.values.min()) for series in known)
    high = max(float(series.values.max()) for series in known)
    start = min(float(series.steps[0]) for series in known)
    to = max(float(series.steps[-1]) for series in known)
    x_scale, y_scale = WIDTH / ((to - start) or 1), (HEIGHT - 8) / ((high - low) or 1)

    def points(steps: NDArray[np.float64], values: NDArray[np.float64]) -> str:
        xs, ys = (steps - start) * x_scale, HEIGHT - 4 - (values - low) * y_scale
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))

    lines: list[Line | None] = []
    for series in there:
        if series is None:
            lines.append(None)
            continue
        steps, mean, lowest, highest = binned(series)
        band = ""
        if len(steps) < len(series.steps):
            around = np.concatenate([steps, steps[::-1]])
            band = points(around, np.concatenate([lowest, highest[::-1]]))
        lines.append(Line(points(steps, mean), band, *ends(series)))
    known_as = (METRICS | OF_TRAINERS).get(name.rpartition("cme/")[2]) if "cme/" in name else None
    says = f"{known_as.meaning} ({known_as.unit})" if known_as else ""
    worry = known_as.worry if known_as else _worry(name)
    return Chart(name, says, worry, lines, low, high, to)


def binned(series: Series) -> tuple[NDArray[np.float64], ...]:
    """Steps, means, lowest and highest of at most `BINS` runs of neighbours."""
    n = len(series.steps)
    if n <= BINS:
        return series.steps, series.values, series.values, series.values
    starts = np.linspace(0, n, BINS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, n))
    return (
        np.add.reduceat(series.steps, starts) / counts,
        np.add.reduceat(series.values, starts) / counts,
        np.minimum.reduceat(series.values, starts),
        np.maximum.reduceat(series.values, starts),
    )


OF_POLICIES = {
    LENGTH: "it grows or shrinks by half",
    CUT_OFF: "it is above a half",
    ENTROPY: "it halves",
}
"""When to worry about what trainers log of any policy: see `signs`."""


def _worry(name: str) -> str:
    return next((worry for metric, worry in OF_POLICIES.items() if re.search(metric, name)), "")


def _of_interest(name: str) -> bool:
    return "cme/" in name or bool(_worry(name))


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
