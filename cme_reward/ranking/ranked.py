"""A response that can be ranked, and what of it needs no verifier."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WORST = 3
MEAN, SUM, LOWEST = "mean (Eq. 3)", "sum", f"worst {WORST} tokens"
SHORTER, UNREPEATED = "shorter wins", "less repeated wins"


@dataclass
class Ranked:
    """A response, and all that it can be ranked by."""

    line: int
    """Of the file, from 1."""
    group: Hashable
    """Responses of one group are compared: those to one prompt, or the two of a line."""
    text: str
    label: float | None = None
    """Higher is better; None where nothing is known."""
    tokens: int = 0
    """Verifier tokens, end of turn included: its length."""
    scores: dict[str, float] = field(default_factory=dict)
    """In nats; higher is better."""


def repeated(text: str, n: int = 4) -> float:
    """Share of a text's 4-grams of words that it has had before; 0 for shorter ones."""
    grams = word_grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def word_grams(text: str, n: int = 4) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def boilerplate(ranked: Sequence[Ranked]) -> NDArray[np.float64]:
    """Of each response, the share of its 4-grams of words that answers to other prompts have too.

    What a template wrote, or a habit; 0 for responses without four words.
    """
    where: dict[tuple[str, ...], set] = {}
    grams = [set(word_grams(one.text)) for one in ranked]
    for one, own in zip(ranked, grams, strict=True):
        for gram in own:
            where.setdefault(gram, set()).add(one.group)
    return np.array(
        [sum(len(where[g]) > 1 for g in own) / len(own) if own else 0.0 for own in grams]
    )
