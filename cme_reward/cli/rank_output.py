"""What `cme-reward rank` found, as a table, as JSON, as lines and as heat maps."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cme_reward.cli.jsonl import Good, whole_file
from cme_reward.cli.rank_rows import Response
from cme_reward.cli.score import Scored, as_line, as_view, rounded, score_rows
from cme_reward.heatmap.render import ResponseView
from cme_reward.ranking.page import HEADS, cells
from cme_reward.ranking.report import Report

if TYPE_CHECKING:
    from rich.console import Console

    from cme_reward.reward import CrossModelEntropy

WORST_SHOWN = 10
"""Pairs, or prompts, that the page has heat maps of."""


def show(report: Report, console: Console) -> None:
    """The report in a terminal; the first verdict last, where it is read."""
    from rich import box
    from rich.table import Column, Table

    labelled = sum(one.label is not None for one in report.ranked)
    console.print(
        f"{len(report.ranked):,} responses to {report.prompts:,} prompts, {labelled:,} labelled; "
        f"{len(report.pairs):,} pairs, {len(report.equal):,} of equal length"
    )
    heads = (Column(head, no_wrap="95" in head, overflow="fold") for head in HEADS)
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in cells(report):
        table.add_row(*row)
    console.print(table)
    if len(report.pairs):
        console.print(
            f"Mean label of a response drawn at random {report.drawn:.2f}, of each prompt's best "
            f"{report.best:.2f}."
        )
    for a, b, share, n in report.agreement:
        console.print(f"{a} and {b} agree on {share:.2f} of {n:,} pairs (0.5: chance).",
                      markup=False)  # fmt: skip
    for warning in report.warnings:
        console.print(warning, style="yellow", markup=False)
    for verdict in reversed(report.verdicts):
        console.print(verdict.text, style=f"bold {verdict.colour}", markup=False)


def as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON's values; null where nothing is known."""

    def number(value: float) -> float | None:
        return round(value, 6) if value == value else None

    return {
        "responses": len(report.ranked),
        "prompts": report.prompts,
        "pairs": len(report.pairs),
        "pairs_of_equal_length": len(report.equal),
        "scores": [
            {
                "name": c.name,
                "accuracy": [number(x) for x in c.accuracy],
                "accuracy_at_equal_length": [number(x) for x in c.equal_length],
                "auroc": number(c.auroc),
                "length_correlation": number(c.length),
                "best_of_n": number(c.picked),
            }
            for c in report.columns
        ],
        "random_of_n": number(report.drawn),
        "agreement": [
            {"verifiers": [a, b], "share": number(share), "pairs": n}
            for a, b, share, n in report.agreement
        ],
        "by_length": [
            {"better_is": name, "pairs": n, "accuracy": [number(x) for x in accuracy]}
            for name, n, accuracy in report.by_length
        ],
        "risk_coverage": _risk_coverage(report),
        "warnings": report.warnings,
        "verdict": asdict(report.verdict),
        "other_verdicts": [asdict(one) for one in report.verdicts[1:]],
    }


def _risk_coverage(report: Report) -> dict[str, list[float]]:
    """Share of pairs that are wrong, of each tenth of them with the widest margins and more."""
    coverage, risk = report.risk_coverage
    at = np.unique(np.searchsorted(coverage, np.arange(1, 11) / 10 - 1e-9)) if len(risk) else []
    return {
        "coverage": [round(float(coverage[k]), 6) for k in at],
        "risk": [round(float(risk[k]), 6) for k in at],
    }


def write_rows(path: Path, report: Report, kept: list[Response], *, best: bool) -> None:
    first = report.columns[0].name
    order: dict[Any, list[int]] = {}
    for k in sorted(range(len(kept)), key=lambda k: -report.ranked[k].scores[first]):
        order.setdefault(report.ranked[k].group, []).append(k)
    place = {k: n for group in order.values() for n, k in enumerate(group, 1)}
    with whole_file(path) as stream:
        for k, response in enumerate(kept):
            if best and place[k] > 1:
                continue
            scores = {name: rounded(x) for name, x in report.ranked[k].scores.items()}
            stream.write(as_line({**response.fields, "scores": scores, "rank": place[k]}))


def views(
    report: Report, kept: list[Response], scorer: CrossModelEntropy, *, end: bool
) -> list[ResponseView]:
    """Heat maps of the worst pairs, or of the first prompts where there are none."""
    place = {id(one): k for k, one in enumerate(report.ranked)}
    chosen = [
        (place[id(one)], f"{side} by its label ({one.label:g}), line {one.line}")
        for pair in report.misranked(WORST_SHOWN)
        for one, side in zip(pair, ("better", "worse"), strict=True)
    ]
    if not len(report.pairs):
        groups = list(dict.fromkeys(one.group for one in report.ranked))[:WORST_SHOWN]
        chosen = [(k, f"line {o.line}") for k, o in enumerate(report.ranked) if o.group in groups]
    eos_id = scorer.generator.end_of_turn if end else None
    rows: list[Good] = [kept[k] for k, _ in chosen]
    again = score_rows(scorer, rows, Counter(), eos_id)
    return [
        replace(as_view(scored, scorer), label=name)
        for scored, (_, name) in zip(again, chosen, strict=True)
        if isinstance(scored, Scored)
    ]
