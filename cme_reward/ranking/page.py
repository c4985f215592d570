"""A report as one HTML page: numbers and pictures above the heat maps of what went most wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cme_reward.heatmap.pages import template
from cme_reward.heatmap.render import ResponseView, render_html
from cme_reward.ranking.report import Report

HEADS = (
    "scored by",
    "right way round\n[95 %]",
    "at equal length\n[95 %]",
    "AUROC",
    "length",
    "best of n",
)
POINTS = 400
"""Most of a curve."""


def cells(report: Report) -> list[tuple[str, ...]]:
    """The table of a report, as texts under `HEADS`; "-" where nothing is known."""
    return [
        (
            c.name,
            str(c.accuracy),
            str(c.equal_length),
            *("-" if not np.isfinite(x) else f"{x:.2f}" for x in (c.auroc, c.length, c.picked)),
        )
        for c in report.columns
    ]


def render(report: Report, views: Sequence[ResponseView], *, title: str, verifier: str,
           generator: str) -> str:  # fmt: skip
    """The page, which needs no network.

    Args:
        report: what was found.
        views: the responses whose heat maps are shown, those of a prompt side by side.
        title: its title.
        verifier: who reads.
        generator: whose tokens are shown.
    """
    coverage, risk = report.risk_coverage
    at = np.unique(np.linspace(0, max(len(risk) - 1, 0), min(POINTS, len(risk))).astype(int))
    above = template("cme_reward.ranking").render(
        report=report,
        heads=HEADS,
        rows=cells(report),
        curve=" ".join(f"{40 + 350 * coverage[k]:.1f},{200 - 190 * risk[k]:.1f}" for k in at),
        lengths=report.by_length,
        shown="The pairs it gets most wrong" if report.pairs else "The first prompts",
    )
    return render_html(
        views, title=title, verifier_name=verifier, generator_name=generator, above=above
    )
