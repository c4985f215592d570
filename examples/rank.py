"""Show what `cme-reward score` wrote: right and wrong solutions of each problem by their reward.

python examples/rank.py scores.jsonl
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(path: str) -> None:
    """Print a table, and how often a right solution is above a wrong one of the same problem."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    problems: dict[str, list[dict]] = {}
    for row in rows:
        problems.setdefault(row["prompt"], []).append(row)
    table = Table(title="Sequence reward (nats per verifier token, higher is less surprising)")
    table.add_column("problem", max_width=30, no_wrap=True)
    table.add_column("right", justify="right", style="green", no_wrap=True)
    table.add_column("wrong", justify="right", style="red", no_wrap=True)
    wins = pairs = 0.0
    for prompt, solutions in problems.items():
        right = [row["sequence_reward"] for row in solutions if row["is_correct"]]
        wrong = [row["sequence_reward"] for row in solutions if not row["is_correct"]]
        for r, w in product(right, wrong):
            wins += (r > w) + (r == w) / 2
            pairs += 1
        table.add_row(
            prompt,
            " ".join(f"{r:.2f}" for r in sorted(right, reverse=True)),
            " ".join(f"{w:.2f}" for w in sorted(wrong, reverse=True)),
        )
    console = Console()
    console.print(table)
    console.print(
        f"A right solution is above a wrong one in {wins:g} of {pairs:g} pairs: no more than a "
        "model of a few million parameters can tell (its model card has the figure for more)."
    )


if __name__ == "__main__":
    main(sys.argv[1])
