"""Which tokens the samples of a step were rewarded for most and least: what a policy is taught."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cme_reward.curves.samples import Sample
from cme_reward.heatmap.glyphs import segments, with_characters

LEAST = 3
"""Occurrences that a token needs: the mean of fewer says more about their places."""
ROWS, AROUND = 8, 6
"""Most tokens of a list, and tokens of the context on either side."""


class Place(NamedTuple):
    nats: float
    before: str
    after: str


class Token(NamedTuple):
    """A token by its text, over the samples of one step."""

    text: str
    nats: float
    """Mean of the verifier's log-probs."""
    times: int
    typical: Place
    """That of its places whose log-prob is nearest to the mean."""


class Extremes(NamedTuple):
    """Tokens with a reward that came often enough, the most extreme first; none is in both."""

    step: int
    responses: int
    most: list[Token]
    least: list[Token]


def extremes(samples: Sequence[Sample]) -> list[Extremes]:
    """Of the first step that was kept and of the last; of one where there is one, none of none."""
    steps = sorted({one.step for one in samples})
    return [
        _of_step(step, [one for one in samples if one.step == step])
        for step in dict.fromkeys(steps[:1] + steps[-1:])
    ]


def _of_step(step: int, samples: Sequence[Sample]) -> Extremes:
    places: dict[str, list[Place]] = {}
    for sample in samples:
        view = sample.view.generator
        texts = ["".join(map(_shown, segments(text))) for text in with_characters(view.tokens)]
        for t, (nats, scored) in enumerate(zip(view.logprobs, view.mask, strict=True)):
            if scored:
                before = "".join(texts[max(0, t - AROUND) : t])
                place = Place(nats, before, "".join(texts[t + 1 : t + 1 + AROUND]))
                places.setdefault(texts[t], []).append(place)
    found = [_mean(text, those) for text, those in places.items() if len(those) >= LEAST]
    found.sort(key=lambda token: (-token.nats, -token.times, token.text))
    most = min(ROWS, (len(found) + 1) // 2)
    least = min(ROWS, len(found) - most)
    return Extremes(step, len(samples), found[:most], found[::-1][:least])


def _mean(text: str, places: Sequence[Place]) -> Token:
    mean = sum(place.nats for place in places) / len(places)
    typical = min(places, key=lambda place: abs(place.nats - mean))
    return Token(text, mean, len(places), typical)


def _shown(segment: tuple[str, str]) -> str:
    kind, text = segment
    if kind in ("bytes", "lost", "control"):
        return f"⟨{text}⟩"
    return {"newline": "↵", "tab": "⇥"}.get(kind, text)
