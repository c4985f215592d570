"""Naive, exact definitions that the fast code is held against: loops and fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def byte_cells(pieces: Sequence[bytes]) -> tuple[str, list[Fraction]]:
    """Text and right ends, in characters, of tokens that write these bytes.

    Each byte of a k-byte character is 1/k of it. An invalid sequence is one U+FFFD; a character
    left unfinished at the end is not there.
    """
    data = b"".join(pieces)
    cells: list[Fraction] = []
    text = ""
    while len(cells) < len(data):
        rest = data[len(cells) :]
        for k in (1, 2, 3, 4):
            try:
                text += rest[:k].decode()
                break
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    text += "\N{REPLACEMENT CHARACTER}"
                    k = error.end - error.start
                    break
                if k >= len(rest):  # unfinished
                    cells += [Fraction(0)] * len(rest)
                    k = 0
                    break
        cells += [Fraction(1, k)] * k if k else []
    ends, done, n = [], Fraction(0), 0
    for piece in pieces:
        done += sum(cells[n : n + len(piece)], Fraction(0))
        n += len(piece)
        ends.append(done)
    return text, ends


def without_word_space(text: str, said: str = "") -> str:
    """What a chat model is shown of a turn: no single space in front of its first word.

    `said` is what it was already shown of the turn.
    """
    begins = not said and text[:1] == " " and len(text) > 1 and not text[1].isspace()
    return text[1:] if begins else text


def as_message(text: str, ends: Sequence[int]) -> tuple[str, list[int]]:
    """A whole turn `without_word_space`, and right ends of its tokens in twelfths."""
    shown = without_word_space(text)
    return shown, [max(end - 12 * (len(text) - len(shown)), 0) for end in ends]


def align(
    logprobs: Sequence[Fraction],
    verifier_ends: Sequence[int | Fraction],
    generator_ends: Sequence[int | Fraction],
) -> list[Fraction]:
    """`sum_s w[t, s] logp[s]` with `w = |overlap| / |span of s|`, by a double loop."""
    aligned = []
    generator_start: int | Fraction = 0
    for generator_end in generator_ends:
        total = Fraction(0)
        start: int | Fraction = 0
        for logp, end in zip(logprobs, verifier_ends, strict=True):
            overlap = min(end, generator_end) - max(start, generator_start)
            if overlap > 0:
                total += Fraction(overlap, end - start) * logp
            start = end
        aligned.append(total)
        generator_start = generator_end
    return aligned


def returns_to_go(
    rewards: Sequence[float | None], sampled: Sequence[bool | int] | None = None, gamma: float = 1.0
) -> list[float | None]:
    """`sum_k gamma^(sampled tokens from t to k) r_k` over k >= t, one term at a time.

    None stands for no reward; returned, for a token that nobody sampled or after which nothing has
    a reward.
    """
    chosen = [True] * len(rewards) if sampled is None else [bool(flag) for flag in sampled]
    found: list[float | None] = []
    for t in range(len(rewards)):
        terms, steps = [], 0
        for k in range(t, len(rewards)):
            if rewards[k] is not None:
                terms.append(gamma**steps * (rewards[k] or 0.0))
            steps += chosen[k]
        found.append(sum(terms) if terms and chosen[t] else None)
    return found
