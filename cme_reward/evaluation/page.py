"""An evaluation as one HTML page: its table, and every pair to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cme_reward.evaluation.judge import FAILED, UNREADABLE
from cme_reward.evaluation.pairs import Pair
from cme_reward.evaluation.results import (
    ABSTAINED,
    INCONSISTENT,
    LOSS,
    OUTCOMES,
    TIE,
    WIN,
    Agreement,
    Outcome,
    Result,
)
from cme_reward.heatmap.pages import template, theme

HEADS = (
    "model",
    "judge",
    "win rate\n[95 %]",
    "at equal\nlength",
    "N",
    "wins",
    "ties",
    "losses",
    "of ties\ninconsistent",
    "not counted",
)


def cells(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table of an evaluation, as texts under `HEADS`; "-" where nothing is known."""
    return [
        (
            one.model,
            one.judge,
            str(one.rate),
            f"{one.controlled:.2f}" if np.isfinite(one.controlled) else "-",
            *(f"{n:,}" for n in (one.n, *(one.counts[x] for x in (WIN, TIE, LOSS, INCONSISTENT)))),
            ", ".join(
                f"{one.counts[x]:,} {x}" for x in (ABSTAINED, UNREADABLE, FAILED) if one.counts[x]
            )
            or "0",
        )
        for one in results
    ]


def render(
    results: Sequence[Result], agreements: Sequence[Agreement], outcomes: Sequence[Outcome]
) -> str:
    """The page, which needs no network."""
    of: dict[int, tuple[Pair, list[Outcome]]] = {}
    for one in outcomes:
        of.setdefault(id(one.pair), (one.pair, []))[1].append(one)
    page = template("cme_reward.evaluation", said=_said)
    return page.render(
        theme=theme(),
        title=f"Against {results[0].baseline}",
        heads=HEADS,
        rows=cells(results),
        agreements=agreements,
        samples=list(of.values()),
        outcomes=[x for x in OUTCOMES if any(one.says == x for one in outcomes)],
    )


def _said(messages: object) -> list[tuple[str, str]]:
    """A prompt's turns, as role and text."""
    from cme_reward.conversation.messages import as_messages

    if isinstance(messages, str):
        return [("prompt", messages)]
    turns = as_messages(messages)  # type: ignore[arg-type]
    return [(str(turn["role"]), str(turn.get("content") or "")) for turn in turns]
