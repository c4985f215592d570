"""Outcomes of pairs for `cme-reward evaluate`: from judges, or from what the lines say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cme_reward._keys import prompt_key
from cme_reward.cli.evaluate_judges import Prices
from cme_reward.cli.terminal import counting, say
from cme_reward.errors import InputError
from cme_reward.evaluation.journal import open_journal
from cme_reward.evaluation.judge import Judge
from cme_reward.evaluation.pairs import Pair
from cme_reward.evaluation.results import Outcome, abstaining, outcomes_of, side
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
    abstain_above: float | None,
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
    return outcomes_of(questions, known, abstain_above), spent if prices.of else None


def stored(
    preferences: Mapping[tuple[str, str, str], float],
    pairs: Sequence[Pair],
    name: str,
    abstain_above: float | None,
) -> list[Outcome]:
    """The outcomes of the pairs of which a line holds a preference.

    Raises:
        InputError: where there is none.
    """
    found = []
    for pair in pairs:
        key = prompt_key(pair.prompt)
        chance = preferences.get((key, pair.model, pair.baseline))
        if chance is None and (key, pair.baseline, pair.model) in preferences:
            chance = 1 - preferences[key, pair.baseline, pair.model]
        if chance is not None:
            one = Outcome(pair, name, side(chance), chance, entropy(chance))
            found.append(abstaining(one, abstain_above))
    if not found:
        against = pairs[0].baseline
        there = {(a, b) for _, *names in preferences for a, b in [sorted(names)]}
        shown = ", ".join(f"{a} and {b}" for a, b in sorted(there)[:5]) or "nothing"
        raise InputError(
            f"no line has a preference {name!r} between {against} and another model; they compare "
            f"{shown}; see --against and --preferences"
        )
    return found
