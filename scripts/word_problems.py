"""Write examples/word-problems.jsonl: `python scripts/word_problems.py`.

Word problems as `embedded_text` writes them, each with its solution and with the same solution
after one slip: of the kind that the embedded verifier was trained on, from a seed that it was not.
Nothing is chosen by its score: the problems are the first of the seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from embedded_text import GENERATORS, GOODS, ITEMS, make_writer

SEED, ROUNDS = 20261127, 2
FILE = Path(__file__).parent.parent / "examples" / "word-problems.jsonl"
Slip = Callable[[str, str, random.Random], str]


def misread(prompt: str, solution: str, r: random.Random) -> str:
    """A number of the question, read wrongly throughout."""
    numbers = [n for n in re.findall(r"\d+", prompt) if re.search(rf"\b{n}\b", solution)]
    if not numbers:
        return solution
    number = r.choice(numbers)
    return re.sub(rf"\b{number}\b", str(int(number) + r.randint(1, 3)), solution)


def misnamed(prompt: str, solution: str, r: random.Random) -> str:
    """Things that the question does not speak of, in place of its own."""
    named = [w for w in (*ITEMS, *GOODS) if re.search(rf"\b{w}", solution)]
    if not named:
        return solution
    others = ITEMS if named[0] in ITEMS else GOODS
    other = r.choice([w for w in others if w not in prompt])
    return re.sub(rf"\b{named[0]}", other, solution)


def disordered(prompt: str, solution: str, r: random.Random) -> str:
    """The steps in reverse, each before what it needs."""
    *steps, answer = solution.split("\n")
    return "\n".join([*reversed(steps), answer])


def miscounted(prompt: str, solution: str, r: random.Random) -> str:
    """The last result off by one, wherever it is written."""
    result = re.findall(r">>(\d+(?:\.\d+)?)", solution)[-1]
    wrong = f"{float(result) + 1:g}"
    return re.sub(rf"(?<![\d.]){re.escape(result)}(?![\d.]*\d)", wrong, solution)


SLIPS: tuple[Slip, ...] = (misread, misnamed, disordered, miscounted)


def rows(seed: int, rounds: int) -> list[dict[str, object]]:
    """A problem of every kind a round, its solution, and a row for each slip that changes it."""
    r = random.Random(seed)
    kinds = [make for _, make in GENERATORS if make.__name__.endswith("_problem")]
    found: list[dict[str, object]] = []
    for n in range(rounds * len(kinds)):
        prompt, solution = kinds[n % len(kinds)](r, make_writer(r))
        written = {"solution": solution}
        written |= {slip.__name__: slip(prompt, solution, r) for slip in SLIPS}
        for name, response in written.items():
            right = name == "solution"
            if right or response != solution:
                found.append(
                    {"id": f"{n}/{name}", "prompt": prompt, "response": response,
                     "is_correct": right}
                )  # fmt: skip
    return found


if __name__ == "__main__":
    lines = [json.dumps(row) + "\n" for row in rows(SEED, ROUNDS)]
    FILE.write_text("".join(lines), encoding="utf-8")
