"""Outcomes of pairs for `cme-reward evaluate`: from judges, or from what the lines say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cme_reward._keys import prompt_key
from cme_reward.cli.evaluate_judges import Prices
from cme_reward.cli.terminal import counting, say
from cme_reward.errors import InputError
from cme_reward.evaluation.calibration import Calibration, calibrate
from cme_reward.evaluation.journal import open_journal
from cme_reward.evaluation.judge import Judge
from cme_reward.evaluation.pairs import Pair, digest
from cme_reward.evaluation.results import Outcome, outcomes_of, side
from cme_reward.evaluation.run import ask_all, questions_of
from cme_reward.evaluation.statistics import entropy

if TYPE_CHECKING:
    from rich.console import Console


def judged(
    judges: Sequence[Judge],
    pairs: Sequence[Pair],
    folder: Path,
    *,
    seed: int,
    both_orders: bool,
    prices: Prices,
    concurrency: int,
    quiet: bool,
    err: Console,
) -> tuple[list[Outcome], float | None]:
    """The outcomes of all pairs, and what their judgments cost where prices are known."""
    questions = questions_of(judges, pairs, seed=seed, both_orders=both_orders)
    spent = 0.0
    with (
        open_journal(folder) as journal,
        counting(err, quiet, "Judging", len(questions)) as advance,
    ):

        def done(judgment: dict[str, Any] | None, new: bool) -> None:
            nonlocal spent
            spent += prices.cost(judgment) if judgment else 0.0
            advance(f"{spent:.2f} USD" if prices.of else "")

        def stopping() -> None:
            say(err, "waiting for the answers under way, which are paid for")

        ask_all(questions, journal, concurrency=concurrency, done=done, stopping=stopping)
        known = dict(journal.known)
    return outcomes_of(questions, known), spent if prices.of else None


def stored(
    preferences: Mapping[tuple[str, str, str], float], pairs: Sequence[Pair], name: str
) -> list[Outcome]:
    """The outcomes of the pairs of which a line holds a preference.

    Raises:
        InputError: where there is none.
    """
    found = []
    for pair in pairs:
        chance = _preference(preferences, pair)
        if chance is not None:
            said = side(chance)
            found.append(Outcome(pair, name, said, said, chance, entropy(chance)))
    if not found:
        against = pairs[0].baseline
        there = {(a, b) for _, *names in preferences for a, b in [sorted(names)]}
        shown = ", ".join(f"{a} and {b}" for a, b in sorted(there)[:5]) or "nothing"
        raise InputError(
            f"no line has a preference {name!r} between {against} and another model; they compare "
            f"{shown}; see --against and --preferences"
        )
    return found


def better_sides(
    labels: Mapping[tuple[str, str, str], float], pairs: Sequence[Pair], name: str
) -> dict[int, str]:
    """WIN or LOSS of the pairs, by `id`, whose better response the labels tell.

    Raises:
        InputError: where there is none.
    """
    found = {}
    for pair in pairs:
        chance = _preference(labels, pair)
        if chance is None:
            key = prompt_key(pair.prompt)
            own, other = (labels.get((key, one, "")) for one in (pair.model, pair.baseline))
            chance = 0.5 if own is None or other is None else (own > other) + (own == other) / 2
        if chance != 0.5:
            found[id(pair)] = side(chance)
    if not found:
        raise InputError(
            f"--label {name}: of no pair it tells the better response; expected true or false, or "
            'a number, of both responses, or {"vs": "the other model", "p_win": 1}'
        )
    return found


def calibrated(
    outcomes: Sequence[Outcome], sides: Mapping[int, str], level: float, seed: int
) -> list[Calibration]:
    """A threshold for each judge, from one labelled pair of each prompt.

    Pairs of one prompt share a response, and are not independent; which one it is, if several
    models have one, a hash of the seed draws. A tie is a wrong verdict: the label names a side.
    """
    of: dict[str, dict[str, tuple[str, Outcome]]] = {}
    for one in outcomes:
        own = of.setdefault(one.judge, {})
        if one.verdict and id(one.pair) in sides:
            key = prompt_key(one.pair.prompt)
            drawn = digest(seed, "calibration", key, one.pair.model)
            if key not in own or drawn < own[key][0]:
                own[key] = drawn, one
    found = []
    for judge, drawn_of in of.items():
        drawn_ones = [one for _, one in drawn_of.values()]
        uncertainty = np.array([one.uncertainty for one in drawn_ones])
        wrong = np.array([one.verdict != sides[id(one.pair)] for one in drawn_ones], dtype=bool)
        found.append(calibrate(judge, uncertainty, wrong, level))
    return found


def _preference(known: Mapping[tuple[str, str, str], float], pair: Pair) -> float | None:
    """For the model, of what is known by prompt, model and the other one, in either order."""
    key = prompt_key(pair.prompt)
    chance = known.get((key, pair.model, pair.baseline))
    if chance is None and (key, pair.baseline, pair.model) in known:
        return 1 - known[key, pair.baseline, pair.model]
    return chance
