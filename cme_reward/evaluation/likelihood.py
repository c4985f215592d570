"""What a judge's log-probs say of its verdict: the chances of A, B and TIE where it stands."""

from __future__ import annotations

import math
import re
from typing import Any

from cme_reward.errors import ConfigError
from cme_reward.evaluation.judge import VERDICTS

ASKED = 20
"""Alternatives asked for at each token, the most that OpenAI's API gives."""
_VERDICT = re.compile(r"VERDICT:\s*(A|B|TIE)(?![A-Za-z])")
_PIECES = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
"""Signs that stand for white space where a server gives a tokenizer's pieces as they are."""


def verdict_chances(verdict: str, given: Any, judge: str) -> tuple[float, float, float]:
    """Chances of A, B and TIE at the token in which the verdict begins; they sum to 1.

        p(v) = sum of exp(log-prob) of the alternatives that begin v / the same of all three

    An alternative begins a verdict where it has the token's text up to the verdict (a space, or
    `: `), and then A, B, or a first part of TIE. The chances depend on the reason that the judge
    wrote before. What is not among the alternatives has the chance 0.

    Args:
        verdict: what was read from the reply, one of VERDICTS.
        given: `choices[0].logprobs` of OpenAI's chat completions.
        judge: its name, for the errors.

    Raises:
        ConfigError: where there are no log-probs, no alternatives, or not those of this reply.
    """

    def wrong(what: str) -> ConfigError:
        return ConfigError(
            f"the judge {judge} was asked for logprobs: true, top_logprobs: {ASKED} and gives "
            f"{what}; leave out --judge-logprobs to count its verdicts as they are"
        )

    try:
        tokens = list(given["content"])
        texts = [_text(one) for one in tokens]
    except (TypeError, LookupError, AttributeError):
        raise wrong(f"{str(given)[:80]!r}" if given else "none") from None
    said = list(_VERDICT.finditer("".join(texts)))
    if not said or said[-1][1] != verdict:
        raise wrong("those of a text other than its reply")
    start, k = said[-1].start(1), 0
    while start >= len(texts[k]):
        start, k = start - len(texts[k]), k + 1
    token, text = tokens[k], texts[k]
    try:
        others = [one for one in token["top_logprobs"] if one["token"] != token["token"]]
        logprobs = [(_text(one), float(one["logprob"])) for one in (token, *others)]
    except (TypeError, LookupError, AttributeError, ValueError):
        raise wrong("no top_logprobs with them") from None
    if not others:
        raise wrong("no alternative to the token of the verdict")
    before = text[:start]
    of: dict[str, float] = dict.fromkeys(VERDICTS, 0.0)
    for alternative, logprob in logprobs:
        begun = _begun(alternative[len(before) :].rstrip())
        if alternative.startswith(before) and begun:
            of[begun] += math.exp(logprob)
    total = sum(of.values())
    if not total > 0 or _begun(text[start:].rstrip()) != verdict:
        raise wrong(f"a token that is no verdict: {text!r}")
    a, b, tie = (of[name] / total for name in VERDICTS)
    return a, b, tie


def _text(token: Any) -> str:
    return token["token"].translate(_PIECES)


def _begun(text: str) -> str:
    """The verdict that a text begins; empty where it begins none."""
    if text and "TIE".startswith(text):
        return "TIE"
    return text if text in ("A", "B") else ""
