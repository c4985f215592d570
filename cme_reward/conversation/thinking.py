"""Where a response thinks aloud, by the tags in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Piece:
    """A stretch of an assistant's turn: sampled, or written by a template or an environment."""

    text: str = ""
    tags: list[tuple[int, bool]] = field(default_factory=list)
    """Tags that are special tokens and not in the text: where, and whether the tag opens."""


@dataclass
class Split:
    """What of a piece is answer, and what thought."""

    answers: list[tuple[int, int]]
    """Stretches of characters outside thoughts, in order; the last one ends with the piece, and is
    empty where that ends inside a thought."""
    unclosed: bool
    """A thought is open at the end."""

    def has_thoughts(self, text: str) -> bool:
        """Is anything of the text, or its end, a thought?"""
        return self.unclosed or self.answers != [(0, len(text))]


def split_thoughts(pieces: Sequence[Piece], tags: tuple[str, str]) -> list[Split]:
    """The answers of one turn, which starts with the first piece.

    A thought goes from its opening tag through its closing one and the white space behind that. An
    opening tag inside a thought is part of it. Where the first tag of the turn closes, its
    beginning is a thought: a template has opened it unseen. A thought that is never closed goes on
    to the end.
    """
    events = [_events(piece, tags) for piece in pieces]
    first = next((event for found in events for event in found), None)
    if first is None:
        return [Split([(0, len(piece.text))], unclosed=False) for piece in pieces]
    thinking = not first[2]
    splits = []
    behind = False  # a closing tag, with nothing but white space since
    for piece, found in zip(pieces, events, strict=True):
        answers: list[tuple[int, int]] = []
        start = None if thinking else _after_space(piece.text, 0) if behind else 0
        for begin, end, opens in found:
            if opens and start is not None:
                if start < begin:
                    answers.append((start, begin))
                start = None
            elif not opens and start is None:
                start = _after_space(piece.text, end)
        thinking = start is None
        length = len(piece.text)
        answers.append((length, length) if start is None else (min(start, length), length))
        behind = not thinking and answers[-1] == (length, length) and bool(found or behind)
        splits.append(Split(answers, thinking))
    return splits


def _events(piece: Piece, tags: tuple[str, str]) -> list[tuple[int, int, bool]]:
    """`(start, stop, opens)` of every tag in the piece."""
    if not piece.tags and tags[0] not in piece.text and tags[1] not in piece.text:
        return []
    # The longer one first, since it may begin with the other: `<|channel|>final`, `<|channel|>`.
    by_length = sorted(tags, key=len, reverse=True)
    found = re.finditer("|".join(map(re.escape, by_length)), piece.text)
    events = [(m.start(), m.end(), m[0] == tags[0]) for m in found]
    of_ids = ((at, at, opens) for at, opens in piece.tags)
    # Tags of no text may share a place, and stay in the order of their tokens.
    return sorted([*events, *of_ids], key=lambda event: event[:2])


def _after_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


Start = Literal["answer", "thought", "inside"]
"""How a message begins: with its answer, with an opening tag, or inside a thought that its first
tag closes."""


def start_of(texts: Iterable[str], tags: Sequence[str]) -> Start:
    """How a message of these texts, one after the other, begins."""
    text = "".join(texts)
    if text.lstrip().startswith(tags[0]):
        return "thought"
    before, closing, _ = text.partition(tags[1])
    return "inside" if closing and tags[0] not in before else "answer"
