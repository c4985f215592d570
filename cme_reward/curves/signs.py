"""Signs that a reward is being hacked, or that it has nothing left to say.

Each compares the median of a run's first tenth with that of its last. A sign is a reason to read
samples, not a proof.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from cme_reward.curves.read import Run, Series

LENGTH = r"(completions/mean_length|response_length(/mean)?)$"
CUT_OFF = r"(completions/clipped_ratio|response_length/clip_ratio)$"
ENTROPY = r"(^|/)entropy(_loss)?$"


class Sign(NamedTuple):
    metric: str
    says: str


def signs(run: Run) -> list[Sign]:
    """What to worry about in a run; a metric that it does not have gives none."""
    return [
        Sign(name, says)
        for pattern, look in RULES
        for name, series in run.series.items()
        if re.search(pattern, name) and not name.startswith("val")
        for says in look(series)
    ]


def ends(series: Series) -> tuple[float, float]:
    """Medians of the first tenth and of the last; of single points where there are few."""
    n = max(1, len(series.values) // 10)
    return float(np.median(series.values[:n])), float(np.median(series.values[-n:]))


def _length(series: Series) -> Iterator[str]:
    first, last = ends(series)
    if first > 0 and (last >= 1.5 * first or last <= first / 1.5):
        yield f"Responses went from {first:.3g} to {last:.3g} tokens. Read some of both ends."


def _cut_off(series: Series) -> Iterator[str]:
    _, last = ends(series)
    if last >= 0.5:
        yield (
            f"{last:.0%} of the responses were cut off at the end: the policy hardly stops, and "
            "what it would go on to is never judged. Allow longer ones, or show the verifier "
            "answers that end (examples)."
        )


def _rises(by: float, says: str) -> Callable[[Series], Iterator[str]]:
    """A share that has grown by so much; `says` is filled with what it was and what it is."""

    def look(series: Series) -> Iterator[str]:
        first, last = ends(series)
        if last >= first + by:
            yield says.format(first, last)

    return look


def _entropy(series: Series) -> Iterator[str]:
    first, last = ends(series)
    if first > 0 and last <= 0.5 * first:
        yield (
            f"Entropy went from {first:.3g} to {last:.3g} nats: the policy is settling on few "
            'answers. baseline="policy" keeps more of it, as does a KL penalty.'
        )


def _spread(series: Series) -> Iterator[str]:
    first, last = ends(series)
    if first > 0 and last <= 0.1 * first:
        yield f"It went from {first:.3g} to {last:.3g}: rollouts hardly differ, nothing is learnt."


def _positive(series: Series) -> Iterator[str]:
    """No log-prob is; and less the sampler's own, its mean over samples is minus a divergence."""
    mean = float(np.median(series.values))
    if mean > 0.5:  # a little is the sampling's: top_p, a temperature that log-probs leave out
        yield (
            f"Its median is {mean:.2g} nats. What a policy samples is no likelier to another model "
            'than to itself: with baseline="policy" the log-probs taken away must be of the ids '
            "that were sampled, the one that ends a response included, at the sampling temperature."
        )


def _coverage(series: Series) -> Iterator[str]:
    low = float(series.values.min())
    if low < 0.99:
        yield f"It fell to {low:.3f}: the verifier did not score all of the text."


def _truncated(series: Series) -> Iterator[str]:
    n = int(np.count_nonzero(series.values > 0))
    if n:
        yield f"In {n:,} of {len(series.values):,} steps the verifier's context was too short."


def _explained(series: Series) -> Iterator[str]:
    _, last = ends(series)
    if abs(last) >= 0.9:
        yield f"It ends at {last:.2f}: the reward is little but {'-' * (last < 0)}length."


REPETITION = (
    "Repeated 4-grams went from {:.1%} to {:.1%}: what is repeated is expected, and pays. Try "
    'credit="return" or level="sequence".'
)
WHITESPACE = (
    'White space went from {:.0%} to {:.0%} of the tokens. With whitespace="mask" nothing speaks '
    "against it; otherwise look at the samples."
)
UNCLOSED = "Responses that end inside a thought went from {:.0%} to {:.0%}."
RULES: list[tuple[str, Callable[[Series], Iterator[str]]]] = [
    (LENGTH, _length),
    (CUT_OFF, _cut_off),
    (r"cme/repetition$", _rises(0.05, REPETITION)),
    (r"cme/whitespace$", _rises(0.1, WHITESPACE)),
    (ENTROPY, _entropy),
    (r"cme/(token_reward_std|credited)$", _spread),
    (r"cme/token_reward_mean$", _positive),
    (r"cme/coverage$", _coverage),
    (r"cme/truncated$", _truncated),
    (r"cme/length_correlation$", _explained),
    (r"cme/thinking_unclosed$", _rises(0.1, UNCLOSED)),
]
"""Names of metrics in any of the trainers, and what is looked for in them."""
