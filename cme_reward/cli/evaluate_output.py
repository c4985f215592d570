"""What `cme-reward evaluate` found, as a table, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cme_reward.cli.jsonl import whole_file
from cme_reward.evaluation.calibration import Calibration
from cme_reward.evaluation.page import EXTRAPOLATED, calibration_line, mean_line, render, table
from cme_reward.evaluation.results import (
    OUTCOMES,
    Agreement,
    Mean,
    Outcome,
    Result,
    agreements_of,
    means_of,
    results_of,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Found:
    """All that is shown."""

    outcomes: list[Outcome]
    results: list[Result]
    means: list[Mean]
    agreements: list[Agreement]
    cost: float | None
    """USD; None where no prices are known."""
    calibrations: Sequence[Calibration] = ()

    @staticmethod
    def of(
        outcomes: list[Outcome],
        cost: float | None,
        seed: int,
        calibrations: Sequence[Calibration] = (),
    ) -> Found:
        return Found(
            outcomes,
            results_of(outcomes, seed),
            means_of(outcomes, seed),
            agreements_of(outcomes),
            cost,
            calibrations,
        )


def write(folder: Path, found: Found, settings: dict[str, Any]) -> None:
    """Writes `report.json` and `report.html`."""
    text = json.dumps(as_dict(found, settings), ensure_ascii=False, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "report.json") as stream:
        stream.write(text.encode(errors="replace") + b"\n")
    with whole_file(folder / "report.html") as stream:
        page = render(
            found.results, found.means, found.agreements, found.outcomes, found.calibrations
        )
        stream.write(page.encode(errors="replace"))  # a judge may write half a surrogate pair


def show(found: Found, console: Console) -> None:
    """The table in a terminal."""
    from rich.table import Column, Table
    from rich.text import Text

    results = found.results
    pairs = len({id(one.pair) for one in found.outcomes})
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
    for one in found.means:
        console.print(mean_line(one), markup=False)
    for one in found.agreements:
        kappa = f"{one.kappa:.2f}" if one.kappa == one.kappa else "-"
        console.print(f"{' and '.join(one.judges)}: Cohen's kappa {kappa} on {one.pairs:,} pairs",
                      markup=False)  # fmt: skip
    for one in found.calibrations:
        console.print(calibration_line(one), markup=False)
    if found.cost is not None:
        console.print(f"Judged for {found.cost:.2f} USD.")


def as_dict(found: Found, settings: dict[str, Any]) -> dict[str, Any]:
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
                "length_controlled_win_rate": [number(x) for x in one.controlled],
                "length_extrapolated": one.extrapolated,
                **{{"win": "wins", "tie": "ties", "loss": "losses"}.get(name, name):
                   one.counts[name] for name in OUTCOMES},
            }
            for one in found.results
        ],
        "means": [
            {
                "model": one.model,
                "judges": one.judges,
                "n": one.n,
                "win_rate": [number(x) for x in one.rate],
                "length_controlled_win_rate": [number(x) for x in one.controlled],
            }
            for one in found.means
        ],
        "agreement": [
            {"judges": list(one.judges), "kappa": number(one.kappa), "pairs": one.pairs}
            for one in found.agreements
        ],
        "calibration": [
            {
                "judge": one.judge,
                "level": one.level,
                "threshold": one.threshold,
                "pairs": one.pairs,
                "kept": one.kept,
                "wrong": one.wrong,
                "risk": number(one.risk),
                "risk_bound": number(one.bound),
                "coverage": number(one.coverage),
            }
            for one in found.calibrations
        ],
        "cost_usd": found.cost if found.cost is None else round(found.cost, 6),
    }  # fmt: skip
