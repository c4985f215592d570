"""`check_verifier`: verifiers that keep their promises pass, and each broken one is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_engines import FakeEngine
from tiny_models import trained_tokenizer

from cme_reward import BatchingVerifier, TokenizerError, VerifierError, load_verifier
from cme_reward.verifiers import check_verifier


class Bigram:
    """log p(id | the one before), drawn once."""

    name = "bigram"

    def __init__(self) -> None:
        self.tokenizer: Any = trained_tokenizer()
        self.max_length: Any = 1000
        self.vocab_size: Any = len(self.tokenizer)
        scores = np.random.default_rng(0).normal(size=(self.vocab_size, self.vocab_size))
        self.table = (scores - np.log(np.exp(scores).sum(1, keepdims=True))).astype(np.float32)

    def one(self, prompt: Any, response: Any) -> Any:
        ids = np.array([*prompt, *response], dtype=np.int64)
        start = len(prompt)
        return self.table[ids[start - 1 : -1], ids[start:]]

    def logprobs(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Any]:
        return [self.one(*pair) for pair in zip(prompts, responses, strict=True)]


def test_those_of_the_package_and_one_of_ones_own(verifiers: Callable[..., Any]) -> None:
    check_verifier(Bigram())
    check_verifier(load_verifier("embedded"))  # type: ignore[arg-type]
    with BatchingVerifier(load_verifier("embedded")) as many:  # type: ignore[arg-type]
        check_verifier(many)
    with FakeEngine("vllm", trained_tokenizer(), shift=4) as server:
        check_verifier(verifiers("vllm", server))


class Asynchronous(Bigram):
    async def logprobs_async(self, prompts: Any, responses: Any) -> list[Any]:
        return [row - 1 for row in self.logprobs(prompts, responses)]


class AtItsOwnPlace(Bigram):
    """The usual slip: the row of logits at an id's own position says what comes after it."""

    def one(self, prompt: Any, response: Any) -> Any:
        ids = np.array([*prompt, *response, prompt[0]], dtype=np.int64)
        start = len(prompt)
        return self.table[ids[start:-1], ids[start + 1 :]]


class Unconditional(Bigram):
    """The first id of a response, given nothing."""

    def one(self, prompt: Any, response: Any) -> Any:
        row = super().one(prompt, response).copy()
        row[:1] -= 3
        return row


class Centred(Bigram):
    """By the size of its company."""

    def logprobs(self, prompts: Any, responses: Any) -> list[Any]:
        rows = super().logprobs(prompts, responses)
        return [row - sum(len(one) for one in rows) for row in rows]


class Forgetful(Bigram):
    calls = 0

    def one(self, prompt: Any, response: Any) -> Any:
        self.calls += 1
        return super().one(prompt, response) - self.calls


def changed(**attributes: Any) -> Bigram:
    made = Bigram()
    vars(made).update(attributes)
    return made


def answering(change: Callable[[Any], Any]) -> Bigram:
    made = Bigram()
    plain = made.one
    made.one = lambda prompt, response: change(plain(prompt, response))  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        (Asynchronous(), "logprobs_async answers otherwise than logprobs: by 1 nats a token"),
        (AtItsOwnPlace(), "depends on ids that come later"),
        (Unconditional(), "depends on where the prompt ends"),
        (Centred(), "a response alone has another answer than beside others"),
        (Forgetful(), "the same question has another answer|depends on the order"),
        (changed(logprobs=lambda p, r: [None]), "no questions have 1 answers"),
        (changed(logprobs=lambda p, r: []), "2 responses have 0 answers"),
        (answering(lambda row: row[1:]), r"ids has an answer of shape \(\d+,\)"),
        (answering(lambda row: row[None]), r"shape \(1, \d+\) and dtype float32; expected one"),
        (answering(lambda row: row.astype(int)), "dtype int64"),
        (answering(lambda row: row + 30), "a log-prob is .*; expected a finite number of nats"),
        (answering(lambda row: row * np.nan), "a log-prob is nan"),
        (answering(lambda row: row / 2), "next ids add up to .*; expected 1 at most"),
        (changed(max_length=10), "max_length is 10, too short to be checked"),
        (changed(max_length=None), "max_length is None; expected a number of tokens"),
        (changed(vocab_size=20), "vocab_size is 20, and its tokenizer gives the id"),
        (object(), "object has no name, no tokenizer"),
    ],
)
def test_a_broken_promise_is_named(verifier: Any, says: str) -> None:
    with pytest.raises(VerifierError, match=says):
        check_verifier(verifier)


def test_a_tokenizer_that_is_none() -> None:
    with pytest.raises(TokenizerError):
        check_verifier(changed(tokenizer=object()))
