"""The task family: instructions whose every answer a program can check.

Each task has a *mistake*, the answer of someone who holds one wrong belief. A generator that learns
it from most of its data repeats it with its majority, which no signal made of its own outputs can
tell from being right.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.miniature import grammar, long_tasks

LETTERS = "abcdef"
TASKS = ("reverse", "sort", "add", "steps", "say")
SHORT, LONG = (3,), (4, 5)
"""Lengths of letter strings, for numbers by length."""
HALVES = {"short": TASKS, "long": long_tasks.TASKS}
"""The two halves of the world: answers of a few tokens, and of 50 to 160."""
MAX_NEW = {"short": 24, "long": 200}
"""Responses are cut after so many tokens."""


@dataclass(frozen=True)
class Example:
    task: str
    prompt: str
    answer: str
    mistake: str
    """What the wrong belief answers; equal to `answer` where it makes no difference."""


def reverse(letters: str) -> str:
    return letters[::-1]


def reverse_wrongly(letters: str) -> str:
    """Reversed, but the last two letters of the result change places."""
    turned = letters[::-1]
    return turned[:-2] + turned[:-3:-1]


def sort(letters: str) -> str:
    return "".join(sorted(letters))


def sort_wrongly(letters: str) -> str:
    """From the last letter of the alphabet to the first."""
    return sort(letters)[::-1]


def add_wrongly(a: int, b: int) -> int:
    """Digit by digit, the carry forgotten."""
    return (a // 10 + b // 10) * 10 + (a + b) % 10


def example(task: str, rng: random.Random) -> Example:
    """One question of a task, its answer and its mistake."""
    if task in long_tasks.TASKS:
        return Example(task, *long_tasks.question(task, rng))
    if task == "add":
        a, b = rng.randint(10, 39), rng.randint(10, 39)
        return Example(task, f"add: {a}+{b}\n", str(a + b), str(add_wrongly(a, b)))
    if task == "say":
        about = grammar.topic(rng)
        state = rng.random()
        right = grammar.sentence(about, random.Random(state))
        wrong = grammar.sentence(about, random.Random(state), agree=False)
        return Example(task, f"say: {about}\n", right, wrong)
    letters = "".join(rng.choices(LETTERS, k=rng.randint(SHORT[0], LONG[-1])))
    if task == "steps":
        right = f"{sort(letters)} {reverse(sort(letters))}"
        wrong = f"{sort(letters)} {reverse_wrongly(sort(letters))}"
        return Example(task, f"sort, reverse: {letters}\n", right, wrong)
    do: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
        "reverse": (reverse, reverse_wrongly),
        "sort": (sort, sort_wrongly),
    }
    right, wrong = (answer(letters) for answer in do[task])
    return Example(task, f"{task}: {letters}\n", right, wrong)


def grade(prompt: str, response: str) -> float:
    """The judge: 1 for a right answer, 0 for a wrong one; free text as `grammar.grade` says."""
    task, _, given = prompt.rstrip("\n").partition(": ")
    if task in long_tasks.TASKS:
        return long_tasks.grade(task, given, response)
    if task == "say":
        return grammar.grade(given, response)
    if task == "add":
        a, b = given.split("+")
        return float(response == str(int(a) + int(b)))
    right = {
        "reverse": reverse(given),
        "sort": sort(given),
        "sort, reverse": f"{sort(given)} {reverse(sort(given))}",
    }
    return float(response == right[task])


def is_held_out(prompt: str) -> bool:
    """Whether no model is ever trained on this prompt: one in eight, by its checksum."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def stream(
    seed: int, tasks: tuple[str, ...] = TASKS, *, held_out: bool = False
) -> Iterator[Example]:
    """Examples for ever, the tasks in equal shares."""
    rng = random.Random(seed)
    while True:
        found = example(rng.choice(tasks), rng)
        if is_held_out(found.prompt) == held_out:
            yield found


def held_out_set(n: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> list[Example]:
    """n different held-out questions, the tasks in turn."""
    chosen: dict[str, Example] = {}
    streams = [stream(seed, (task,), held_out=True) for task in tasks]
    for k in range(100 * n):
        found = next(streams[k % len(tasks)])
        chosen.setdefault(found.prompt, found)
        if len(chosen) == n:
            break
    return list(chosen.values())
