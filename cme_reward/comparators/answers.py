"""The final answer in a response's text."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])")


def final_answer(text: str) -> str | None:
    r"""What is in the last `\boxed{...}`; else the last number; else all of the text.

    White space is evened out, and a number is written in one way: `1,000`, `+1000` and `1000.0` are
    the same answer. None where there is no text, or nothing in the box.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        answer = boxed
    else:
        numbers = _NUMBER.findall(text)
        answer = numbers[-1] if numbers else text
    answer = " ".join(answer.split())
    return _plain_number(answer) if _NUMBER.fullmatch(answer) else answer or None


def _last_boxed(text: str) -> str | None:
    """The content of the last box that is closed; braces inside it are balanced."""
    for found in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for i in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                return text[found.end() : i]
    return None


def _plain_number(digits: str) -> str:
    number = Decimal(digits.replace(",", ""))
    plain = format(number, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if number == 0 else plain
