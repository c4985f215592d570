"""The chances of a verdict, from tokens cut in every way that servers cut them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cme_reward import ConfigError
from cme_reward.evaluation.judge import read_verdict
from cme_reward.evaluation.likelihood import verdict_chances

# Of all that the judge could write here: A 0.6, B 0.15, TIE 0.05, other words 0.2.
# Of the three: 0.6 / 0.8, 0.15 / 0.8, 0.05 / 0.8.
EXPECTED = (0.75, 0.1875, 0.0625)


def token(text: str, **others: float) -> dict[str, Any]:
    """A token with its alternatives, by their probabilities."""
    top = [{"token": name, "logprob": math.log(p)} for name, p in others.items()]
    own = others.get(text, 0.9)
    return {"token": text, "logprob": math.log(own), "bytes": None, "top_logprobs": top}


def reply(*tail: dict[str, Any]) -> dict[str, Any]:
    """Of a reason that has a verdict's words in it, and then the tail."""
    return {"content": [token(x, **{x: 0.9, "The": 0.1}) for x in REASON] + list(tail)}


REASON = ["It", " says", " VERD", "ICT", ":", " B", ".", "\n"]
CUTS = {
    "space with it": reply(token("VERDICT"), token(":"),
                           token(" A", **{" A": 0.6, " B": 0.15, " TIE": 0.05, " C": 0.2})),
    "space before it": reply(token("VERDICT:"), token(" ", **{" ": 0.9, " A": 0.1}),
                             token("A", A=0.6, B=0.15, TIE=0.05, An=0.2)),
    "a sign for the space": reply(token("▁VERDICT"), token(":"),
                                  token("▁A", **{"▁A": 0.6, "▁B": 0.15, "▁T": 0.05, "▁I": 0.2})),
    "byte-level pieces": reply(token("Ċ"), token("VERDICT"), token(":"),
                               token("ĠA", **{"ĠA": 0.6, "ĠB": 0.15, "ĠTIE": 0.05, "Ġ": 0.2})),
    "no spaces given": reply(token("VERDICT"), token(":"),
                             token("A", A=0.6, B=0.15, T=0.03, TI=0.02, Tied=0.2)),
    "a longer token": reply(token("VERDICT"),
                            token(": A", **{": A": 0.6, ": B": 0.15, ": TIE": 0.05, ":": 0.2})),
    "all in one": reply(token("VERDICT: A", **{"VERDICT: A": 0.6, "VERDICT: B": 0.15,
                                               "VERDICT: T": 0.05, "Verdict": 0.2})),
    "a line's end in it": reply(token("VERDICT:"),
                                token(" A\n", **{" A": 0.3, " A\n": 0.3, " B": 0.15, " TIE": 0.05,
                                                 " As": 0.2})),
    "an end of turn": reply(token("VERDICT"), token(":"),
                            token(" A", **{" A": 0.6, " B": 0.15, " TIE": 0.05, " a": 0.2}),
                            token("<|im_end|>")),
    "own token not among them": reply(token("VERDICT:"),
                                      {**token(" A", **{" B": 0.15, " TIE": 0.05, " C": 0.1}),
                                       "logprob": math.log(0.6)}),
}  # fmt: skip


@pytest.mark.parametrize("given", CUTS.values(), ids=CUTS)
def test_however_the_verdict_is_cut(given: Any) -> None:
    assert verdict_chances("A", given, "j") == pytest.approx(EXPECTED)


def test_a_tie_begins_with_its_first_piece() -> None:
    tail = token(" T", **{" T": 0.5, " A": 0.3, " B": 0.2}), token("IE", IE=0.99, ied=0.01)
    given = reply(token("VERDICT"), token(":"), *tail)
    assert verdict_chances("TIE", given, "j") == pytest.approx((0.3, 0.2, 0.5))
    said = "".join(one["token"] for one in given["content"])
    assert read_verdict(said)[0] == "TIE"  # what the fixtures spell is a reply


def test_what_is_not_among_the_alternatives_has_no_chance() -> None:
    given = reply(token("VERDICT:"), token(" B", **{" B": 0.99, " b": 0.01}))
    assert verdict_chances("B", given, "j") == (0, 1, 0)


def bare(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -0.1}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (None, "gives none;"),
        ({"content": None}, "gives \"{'content': None}\";"),
        ({"tokens": ["A"], "token_logprobs": [-1.0]}, "'token_logprobs'"),
        ({"content": []}, "a text other than its reply"),
        (reply(token("VERDICT: B", **{"VERDICT: B": 0.9, "x": 0.1})), "other than its reply"),
        ({"content": [bare("token_id:12")]}, "a text other than its reply"),
        ({"content": [bare("VERDICT:"), bare(" A")]}, "no top_logprobs with them"),
        (reply(bare("VERDICT:"), token(" A")), "no alternative to the token of the verdict"),
        (reply(bare("VERDICT:"), token(" A", **{" A": 0.9})), "no alternative"),
        (reply(token("VERDICT: A\nBye", **{"x": 0.1})), "a token that is no verdict"),
    ],
)
def test_what_is_none_is_an_error_with_its_remedy(given: Any, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        verdict_chances("A", given, "gpt at http://host")
    said = str(caught.value)
    assert "the judge gpt at http://host was asked for logprobs: true, top_logprobs: 20" in said
    assert what in said
    assert "leave out --judge-logprobs" in said
