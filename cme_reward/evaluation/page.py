"""An evaluation as one HTML page: its table, and every pair to read."""

from __future__ import annotations

from collections.abc import Sequence

from cme_reward.evaluation.calibration import Calibration
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
    Mean,
    Outcome,
    Result,
)
from cme_reward.heatmap.pages import template

EXTRAPOLATED = (
    "* Nearly all responses are longer, or nearly all shorter, than the baseline's: the rate at "
    "equal length is extrapolated."
)


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The table of an evaluation, as heads and texts; "-" where nothing is known.

    What is the same for all (one judge) or did not occur (pairs without an outcome) has no column.
    """
    columns: list[tuple[str, list[str]]] = [
        ("model", [one.model for one in results]),
        ("judge", [one.judge for one in results]),
        ("win rate\n[95 %]", [str(one.rate) for one in results]),
        (
            "at equal length\n[95 %]",
            [f"{one.controlled}{'*' * one.extrapolated}" for one in results],
        ),
        ("N", [f"{one.n:,}" for one in results]),
        (
            "wins, ties,\nlosses",
            [", ".join(f"{one.counts[x]:,}" for x in (WIN, TIE, LOSS)) for one in results],
        ),
    ]
    columns += [
        (name, [f"{one.counts[x]:,}" for one in results])
        for name, x in (
            ("ties by\norder", INCONSISTENT),
            (ABSTAINED, ABSTAINED),
            (UNREADABLE, UNREADABLE),
            (FAILED, FAILED),
        )
        if any(one.counts[x] for one in results)
    ]
    if len({one.judge for one in results}) == 1:
        del columns[1]
    heads, cells = zip(*columns, strict=True)
    return list(heads), [list(row) for row in zip(*cells, strict=True)]


def calibration_line(one: Calibration) -> str:
    """What the labelled pairs say of a judge, as a sentence."""
    return (
        f"{one.judge} abstains above {one.threshold:g} nats: of {one.pairs:,} labelled pairs it "
        f"keeps {one.kept:,} ({one.coverage:.0%}), {one.wrong:,} of them wrong ({one.risk:.1%}; "
        f"at most {one.bound:.1%}, at 95 % confidence)."
    )


def mean_line(one: Mean) -> str:
    return (
        f"{one.model}, mean of {one.judges} judges: {one.rate}, at equal length {one.controlled}, "
        f"on {one.n:,} pairs"
    )


def render(
    results: Sequence[Result],
    means: Sequence[Mean],
    agreements: Sequence[Agreement],
    outcomes: Sequence[Outcome],
    calibrations: Sequence[Calibration] = (),
) -> str:
    """The page, which needs no network."""
    of: dict[int, tuple[Pair, list[Outcome]]] = {}
    for one in outcomes:
        of.setdefault(id(one.pair), (one.pair, []))[1].append(one)
    page = template("cme_reward.evaluation", said=_said)
    heads, rows = table(results)
    return page.render(
        title=f"Against {results[0].baseline}",
        judges=list(dict.fromkeys(one.judge for one in results)),
        note=EXTRAPOLATED if any(one.extrapolated for one in results) else "",
        heads=heads,
        rows=rows,
        means=[mean_line(one) for one in means],
        agreements=agreements,
        calibrations=[calibration_line(one) for one in calibrations],
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
