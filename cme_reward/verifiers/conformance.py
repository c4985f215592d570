"""Does a verifier keep what `Verifier` promises? For those who write one, and for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from cme_reward.errors import VerifierError
from cme_reward.verifiers.base import Verifier

TEXTS = (
    "Lily has 3 apples and buys 4 more. How many does she have?",
    "She has seven apples: 3 + 4 = 7.",
    "Seven, or so I was told; zebras, xylophones and 今天 are another matter.",
)
NEXT = 64
"""Most continuations whose probabilities are added up."""
ROUNDING = 1e-3
SINGLE = 10
"""Times the tolerance by which a single id's log-prob may differ."""


def check_verifier(verifier: Verifier, *, tolerance: float = 0.05) -> None:
    """Ask a verifier some eighty questions of a few words, and hold it to its promises.

    Its tokenizer is fast and loses no text; an answer has a finite log-prob of at most 0 for each
    id, whether ids come as lists or arrays; none to nothing. It is the same again, alone or in
    other company, and, as ``log p(response[s] | prompt, response[:s])`` says, neither depends on
    what follows nor on where the prompt ends. Probabilities of different next ids do not add up to
    more than 1. `logprobs_async`, where there is one, answers as `logprobs` does.

    Args:
        verifier: of one's own, or any other; of an `Ensemble` each member by itself.
        tolerance: nats by which equal answers may differ, in the mean over a response: half
            precision rounds differently in other company.

    Raises:
        VerifierError: names the promise that is broken, what was seen and what to look at.
        TokenizerError: for a tokenizer that loses text.
    """
    prompt, *responses = _ids(verifier)
    if len(nothing := verifier.logprobs([], [])):
        raise _broken(verifier, f"no questions have {len(nothing)} answers; expected an empty list")
    whole = _answers(verifier, [prompt] * 2, responses)
    near = _Near(verifier.name, tolerance)
    _check_calls(verifier, prompt, responses, whole, near)
    _check_meaning(verifier, prompt, responses, whole, near)
    _check_sum(verifier, prompt)
    asked = getattr(verifier, "logprobs_async", None)
    if asked is not None:
        again = asyncio.run(asked([prompt] * 2, responses))
        near(again, whole, "logprobs_async answers otherwise than logprobs")


class _Near:
    def __init__(self, name: str, tolerance: float) -> None:
        self.name, self.tolerance = name, tolerance

    def __call__(
        self, found: Sequence[Any], wanted: Sequence[Any], broken: str, most: float = 1
    ) -> None:
        allowed = most * self.tolerance
        for one, other in zip(found, wanted, strict=True):
            distance = float(np.abs(np.asarray(one, np.float64) - other).mean())
            if not distance <= allowed:
                raise VerifierError(
                    f"{self.name}: {broken}: by {distance:.3g} nats a token, where at most "
                    f"{allowed:g} is rounding (see tolerance)"
                )


def _check_calls(
    verifier: Verifier, prompt: list[int], responses: list[list[int]], whole: Any, near: _Near
) -> None:
    """That neither the form of a question nor its company matters."""
    with_empty = _answers(verifier, [prompt] * 3, [responses[1], [], responses[0]])
    near(with_empty[::2], whole[::-1], "the answer depends on the order or on an empty response")
    near(_answers(verifier, [prompt] * 2, responses), whole, "the same question has another answer")
    arrays = [np.array(row, dtype=np.int64) for row in (prompt, *responses)]
    near(_answers(verifier, arrays[:1] * 2, arrays[1:]), whole, "arrays are answered unlike lists")
    for response, answer in zip(responses, whole, strict=True):
        alone = _answers(verifier, [prompt], [response])
        near(alone, [answer], "a response alone has another answer than beside others")


def _check_meaning(
    verifier: Verifier, prompt: list[int], responses: list[list[int]], whole: Any, near: _Near
) -> None:
    """An id's log-prob is that of this id, given all before it and nothing after."""
    for response, answer in zip(responses, whole, strict=True):
        half = len(response) // 2
        begun = _answers(verifier, [prompt], [response[:half]])
        near(begun, [answer[:half]], "a log-prob depends on ids that come later")
        moved = _answers(verifier, [prompt + response[:half]], [response[half:]])
        for left in (slice(None), slice(1)):  # a response's first id is where this goes wrong
            near([row[left] for row in moved], [answer[half:][left]], "a log-prob depends on "
                 "where the prompt ends: is it given all of prompt and response before it?",
                 most=SINGLE if left.stop else 1)  # fmt: skip


def _check_sum(verifier: Verifier, prompt: list[int]) -> None:
    n = min(NEXT, verifier.vocab_size)
    if n < 1:
        return
    ids = np.unique(np.linspace(0, verifier.vocab_size - 1, n).astype(int)).tolist()
    answers = _answers(verifier, [prompt] * len(ids), [[token] for token in ids])
    total = float(np.exp(np.concatenate(answers)).sum())
    if total > 1.01:
        raise _broken(
            verifier,
            f"the probabilities of {len(ids)} next ids add up to {total:.3g}; expected 1 at most: "
            "log-probs are a log-softmax over the vocabulary, in nats",
        )


def _ids(verifier: Verifier) -> list[list[int]]:
    """The texts as the verifier's own ids; its attributes are looked at on the way."""
    from cme_reward.spans.fidelity import require_faithful

    missing = [k for k in ("name", "tokenizer", "max_length", "vocab_size", "logprobs")
               if not hasattr(verifier, k)]  # fmt: skip
    if missing:
        raise VerifierError(
            f"{type(verifier).__name__} has no {', no '.join(missing)}; a verifier has name, "
            "tokenizer, max_length, vocab_size and logprobs(prompts, responses)"
        )
    require_faithful(verifier.tokenizer)
    ids = [verifier.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    for name in ("max_length", "vocab_size"):
        value = getattr(verifier, name)
        if not isinstance(value, int | np.integer) or value < 1:
            raise _broken(verifier, f"{name} is {value!r}; expected a number of tokens")
    longest, highest = sum(map(len, ids[::2])), max(map(max, ids))
    if verifier.max_length < longest:
        raise _broken(
            verifier,
            f"max_length is {verifier.max_length}, too short to be checked; expected {longest} "
            "tokens at least",
        )
    if verifier.vocab_size <= highest:
        raise _broken(
            verifier,
            f"vocab_size is {verifier.vocab_size}, and its tokenizer gives the id {highest}; "
            "expected more than the highest id: len(tokenizer), or the model's own vocabulary",
        )
    return ids


def _answers(verifier: Verifier, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Any]:
    """The verifier's, as arrays, one for each response and with a log-prob for each id."""
    answers = [np.asarray(answer) for answer in verifier.logprobs(prompts, responses)]
    if len(answers) != len(responses):
        raise _broken(verifier, f"{len(responses)} responses have {len(answers)} answers")
    for answer, response in zip(answers, responses, strict=True):
        if answer.shape != (len(response),) or answer.dtype.kind != "f":
            raise _broken(
                verifier,
                f"a response of {len(response)} ids has an answer of shape {answer.shape} and "
                f"dtype {answer.dtype}; expected one float for each id",
            )
        wrong = answer[~(answer <= ROUNDING) | ~np.isfinite(answer)]
        if len(wrong):
            raise _broken(
                verifier, f"a log-prob is {wrong[0]}; expected a finite number of nats, at most 0"
            )
    return answers


def _broken(verifier: Verifier, what: str) -> VerifierError:
    return VerifierError(f"{verifier.name}: {what}")
