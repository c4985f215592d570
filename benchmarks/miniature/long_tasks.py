"""The harder half: answers of 50 to 160 tokens, in steps, that a program can check.

A short or a repetitive answer is always likely and always wrong: a sum that stops before the last
number, a story that says a sentence twice. The wrong beliefs are one for each task, as in `tasks`.
"""

from __future__ import annotations

import random
from itertools import accumulate

from benchmarks.miniature import grammar

TOTAL, INSERT, TELL = "total", "insert", "tell"
TASKS = (TOTAL, INSERT, TELL)
LETTERS = "abcdefghijkl"
SIZES = {TOTAL: (8, 9), INSERT: (9, 10), TELL: (6, 8)}
"""Fewest and most steps."""


def question(task: str, rng: random.Random) -> tuple[str, str, str]:
    """Prompt, answer and mistake."""
    n = rng.randint(*SIZES[task])
    if task == TOTAL:
        numbers = [rng.randint(10, 49), *rng.sample(range(1, 10), n)]
        given = "+".join(map(str, numbers))
        return f"{task}: {given}\n", total(numbers), total(numbers, carry=False)
    if task == INSERT:
        letters = rng.sample(LETTERS, n)
        given = "".join(letters)
        return f"{task}: {' '.join(given)}\n", insert(given), insert(given, backwards=True)
    about, state = grammar.topic(rng), rng.random()
    right, wrong = (tell(about, n, random.Random(state), agree=agree) for agree in (True, False))
    return f"{task}: {n} {about}\n", right, wrong


def total(numbers: list[int], *, carry: bool = True) -> str:
    """Digit after digit, "13+9=22 22+4=26"; "13+9=12" without carry."""

    def add(a: int, b: int) -> int:
        return a + b if carry else a // 10 * 10 + (a + b) % 10

    sums = list(accumulate(numbers, add))
    steps = zip(sums[:-1], numbers[1:], sums[1:], strict=True)
    return " ".join(f"{before}+{digit}={after}" for before, digit, after in steps)


def insert(letters: str, *, backwards: bool = False) -> str:
    """Insertion sort, letter after letter with what it makes of the row: "c=c a=ac b=abc"."""
    rows = ["".join(sorted(letters[: k + 1], reverse=backwards)) for k in range(len(letters))]
    return " ".join(f"{letter}={row}" for letter, row in zip(letters, rows, strict=True))


def tell(about: str, n: int, rng: random.Random, *, agree: bool = True) -> str:
    """n different sentences on a topic."""
    said: dict[str, None] = {}
    while len(said) < n:
        said[grammar.sentence(about, rng, agree=agree)] = None
    return " ".join(said)


def grade(task: str, given: str, response: str) -> float:
    """1 for a right answer, 0 for a wrong one; 0.5 for a story with verbs that disagree."""
    if task == TOTAL:
        return float(response == total([int(number) for number in given.split("+")]))
    if task == INSERT:
        return float(response == insert(given.replace(" ", "")))
    n, _, about = given.partition(" ")
    sentences = [f"{sentence}." for sentence in response.removesuffix(".").split(". ")]
    if not response.endswith(".") or len(sentences) != int(n) or len(set(sentences)) != int(n):
        return 0.0
    return min(grammar.grade(about, sentence) for sentence in sentences)
