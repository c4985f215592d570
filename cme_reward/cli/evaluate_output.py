"""What `cme-reward evaluate` found, as a table, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cme_reward.cli.jsonl import whole_file
from cme_reward.evaluation.page import EXTRAPOLATED, render, table
from cme_reward.evaluation.results import (
    OUTCOMES,
    Agreement,
    Outcome,
    Result,
    agreements_of,
    results_of,
)

if TYPE_CHECKING:
    from rich.console import Console


def write(folder: Path, outcomes: Sequence[Outcome], *, seed: int, settings: dict[str, Any],
          cost: float | None) -> dict[str, Any]:  # fmt: skip
    """Writes `report.json` and `report.html`; gives what the former holds."""
    results, agreements = results_of(outcomes, seed), agreements_of(outcomes)
    found = as_dict(results, agreements, settings, cost)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "report.json") as stream:
        stream.write(json.dumps(found, ensure_ascii=False, indent=2).encode() + b"\n")
    with whole_file(folder / "report.html") as stream:
        stream.write(render(results, agreements, outcomes).encode())
    return found


def show(outcomes: Sequence[Outcome], seed: int, cost: float | None, console: Console) -> None:
    """The table in a terminal."""
    from rich.table import Column, Table
    from rich.text import Text

    results = results_of(outcomes, seed)
    pairs = len({id(one.pair) for one in outcomes})
    judges = ", ".join(dict.fromkeys(one.judge for one in results))
    console.print(f"{pairs:,} pairs, against {results[0].baseline}, judged by {judges}",
                  markup=False)  # fmt: skip
    heads, rows = table(results)
    shown = Table(*(Column(head, no_wrap="95" in head, overflow="fold") for head in heads))
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    if any(one.extrapolated for one in results):
        console.print(EXTRAPOLATED)
    for one in agreements_of(outcomes):
        kappa = f"{one.kappa:.2f}" if one.kappa == one.kappa else "-"
        console.print(f"{' and '.join(one.judges)}: Cohen's kappa {kappa} on {one.pairs:,} pairs",
                      markup=False)  # fmt: skip
    if cost is not None:
        console.print(f"Judged for {cost:.2f} USD.")


def as_dict(
    results: Sequence[Result],
    agreements: Sequence[Agreement],
    settings: dict[str, Any],
    cost: float | None,
) -> dict[str, Any]:
    """An evaluation as JSON's values; null where nothing is known."""

    def number(value: float) -> float | None:
        return round(value, 6) if value == value else None

    return {
        "settings": settings,
        "results": [
            {
                "judge": one.judge,
                "model": one.model,
                "baseline": one.baseline,
                "n": one.n,
                "win_rate": [number(x) for x in one.rate],
                "length_controlled_win_rate": number(one.controlled),
                "length_extrapolated": one.extrapolated,
                **{{"win": "wins", "tie": "ties", "loss": "losses"}.get(name, name):
                   one.counts[name] for name in OUTCOMES},
            }
            for one in results
        ],
        "agreement": [
            {"judges": list(one.judges), "kappa": number(one.kappa), "pairs": one.pairs}
            for one in agreements
        ],
        "cost_usd": cost if cost is None else round(cost, 6),
    }  # fmt: skip
