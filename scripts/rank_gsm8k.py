"""Measure how well a verifier's sequence reward ranks right above wrong GSM8K solutions.

For each question, every pair of one correct and one incorrect solution counts: 1 if the correct one
has the higher reward, 0.5 if they tie, 0 otherwise. The interval resamples questions (bootstrap),
because pairs of one question are not independent.

    python scripts/rank_gsm8k.py --data dev_gsm8k.jsonl.gz --verifier embedded
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cme_reward import CrossModelEntropy, Ensemble, load_verifier

Row = dict[str, Any]


def read_rows(path: Path, limit: int | None) -> list[Row]:
    """Read the solutions of the first `limit` questions (all of them when None)."""
    if not path.is_file():
        raise SystemExit(
            f"{path} not found; pass --data PATH to a .jsonl.gz whose rows have prompt, response "
            "and meta.is_correct."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    kept = set(list(dict.fromkeys(row["prompt"] for row in rows))[:limit])
    return [row for row in rows if row["prompt"] in kept]


def sequence_rewards(spec: str, rows: Sequence[Row], batch_size: int) -> np.ndarray:
    """Return the sequence reward of every row: mean log-prob in nats, end of turn included.

    The verifier's own tokenizer (an ensemble's first) stands in for the generator's.
    """
    verifier = load_verifier(spec)
    first = verifier.members[0] if isinstance(verifier, Ensemble) else verifier
    tokenizer: Any = first.tokenizer
    reward = CrossModelEntropy(verifier, tokenizer)
    scores: list[float] = []
    starts = range(0, len(rows), batch_size)
    for start in track(starts, description=f"scoring with {spec}"):
        chunk = rows[start : start + batch_size]
        ids = [
            [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]
            for row in chunk
        ]
        scores.extend(
            float(x) for x in reward([row["prompt"] for row in chunk], ids).sequence_rewards
        )
    return np.array(scores)


def wins_by_question(
    rows: Sequence[Row], scores: Sequence[float] | np.ndarray, *, references: bool
) -> np.ndarray:
    """Return `[questions, 2]`: points won and pairs compared, for questions with such a pair."""
    grouped: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row, score in zip(rows, scores, strict=True):
        if references or not row["meta"]["is_reference"]:
            grouped[row["prompt"]][not row["meta"]["is_correct"]].append(float(score))
    table = []
    for right, wrong in grouped.values():
        if right and wrong:
            diff = np.subtract.outer(right, wrong)
            table.append((float((diff > 0).sum() + 0.5 * (diff == 0).sum()), diff.size))
    if not table:
        raise SystemExit("No question has both a correct and an incorrect solution; raise --limit.")
    return np.array(table)


def bootstrap(table: np.ndarray, seed: int, draws: int = 10_000) -> tuple[float, float, float]:
    """Return pairwise accuracy and its 95 % interval, resampling questions with replacement."""
    rng = np.random.default_rng(seed)
    n = len(table)
    # A multinomial count per question is the same resampling without a [draws, n] index array.
    sums = rng.multinomial(n, np.full(n, 1 / n), size=draws) @ table
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    won, pairs = table.sum(axis=0)
    return float(won / pairs), float(low), float(high)


def untrained_spec(spec: str) -> str | None:
    """Name the same architecture without its training; None where that is not one local model."""
    if spec == "embedded":
        return f"random:{files('cme_reward') / 'verifiers' / 'embedded'}"
    return "random:" + spec[3:] if spec.startswith("hf:") and "+" not in spec else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shared = Path(os.environ.get("CME_SHARED", "."))
    add = parser.add_argument
    add("--verifier", default="embedded", help="what load_verifier takes: embedded, hf:PATH, ...")
    add("--data", type=Path, default=shared / "texts" / "dev_gsm8k.jsonl.gz", help="solutions")
    add("--limit", type=int, help="use only the first N questions")
    add("--batch-size", type=int, default=64, help="solutions scored in one call")
    add("--seed", type=int, default=0, help="seed of the bootstrap and of the random baseline")
    add("--no-untrained", action="store_true", help="leave out the untrained verifier")
    args = parser.parse_args()

    rows = read_rows(args.data, args.limit)
    rng = np.random.default_rng(args.seed)
    columns = {args.verifier: sequence_rewards(args.verifier, rows, args.batch_size)}
    untrained = untrained_spec(args.verifier)
    if untrained and not args.no_untrained:
        columns["untrained verifier"] = sequence_rewards(untrained, rows, args.batch_size)
    columns["shorter wins (characters)"] = np.array([-len(row["response"]) for row in rows])
    columns["random numbers"] = rng.random(len(rows))

    table = Table(title=f"Right above wrong on {args.data.name}: pairwise accuracy")
    for name in ("scored by", "solutions", "questions", "pairs", "accuracy", "95 % interval"):
        table.add_column(name, justify="left" if name in ("scored by", "solutions") else "right")
    for references, which in ((True, "with human reference"), (False, "models only")):
        for name, scores in columns.items():
            wins = wins_by_question(rows, scores, references=references)
            mean, low, high = bootstrap(wins, args.seed)
            table.add_row(
                name, which, str(len(wins)), str(int(wins[:, 1].sum())), f"{mean:.3f}",
                f"{low:.3f} to {high:.3f}",
            )  # fmt: skip
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
