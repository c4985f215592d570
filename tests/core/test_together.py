"""Calls of one turn of an event loop, as one: each with its own results, errors and metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer

from cme_reward import CMEBatch, CMEConfig, CrossModelEntropy, InputError
from cme_reward._together import _WAITING, ALONE, AT_ONCE, together
from cme_reward.metrics import mean
from cme_reward.verifiers.base import Verifier

TIMES = ("verifier_seconds", "alignment_seconds")


def asked_at_once(*asked: Any) -> list[Any]:
    async def main() -> list[Any]:
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(main())


def test_one_call_for_what_is_at_hand_within_the_bounds_of_a_turn() -> None:
    calls = []

    def twice(items: list[int]) -> list[int]:
        calls.append(items)
        return [2 * item for item in items]

    n = AT_ONCE // ALONE
    got = asked_at_once(*(together(twice, k, ALONE) for k in range(2 * n + 1)))
    assert [result for result, _ in got] == [2 * k for k in range(2 * n + 1)]
    assert calls == [[*range(n)], [*range(n, 2 * n)], [2 * n]]


def test_what_fails_fails_alone_and_what_is_cancelled_is_not_done() -> None:
    calls = []

    def inverse(items: list[int]) -> list[float]:
        calls.append(items)
        return [1 / item for item in items]

    async def main() -> list[Any]:
        tasks = [asyncio.ensure_future(together(inverse, k, 1)) for k in (1, 0, 2, 4)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    one, error, half, cancelled = asyncio.run(main())
    assert (one[0], half[0]) == (1, 0.5)
    assert isinstance(error, ZeroDivisionError)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert calls == [[1, 0, 2], [1], [0], [2]]


def test_a_loop_that_ends_in_the_middle_of_a_turn_leaves_nothing_behind() -> None:
    def same(items: list[int]) -> list[int]:
        return items

    loop = asyncio.new_event_loop()
    asking = together(same, 1, 1)
    loop.call_soon(lambda: asking.send(None))
    loop.call_soon(loop.stop)  # before what was asked for is begun
    loop.run_forever()
    loop.close()
    asking.close()
    assert [key for key in _WAITING if key[1] is same]
    assert asyncio.run(together(same, 2, 1))[0] == 2
    assert not [key for key in _WAITING if key[1] is same]


ASKED: list[tuple[Any, ...]] = [
    (["Why?"], [[5, 6, 7]], None, [[-1.0, -2.0, -0.5]]),
    (["Why?", [{"role": "user", "content": "Q"}]], [[9], [8, 7, 6]], None, [[-1.0], [-0.1] * 3]),
    ([], [], None, []),
    (["a", "b"], [[5, 6, 7, 8], [40]], [[1, 1, 0, 1], None], [[-1.0] * 4, [-3.0]]),
    (["empty"], [[]], None, [[]]),
    (["long"], [[11, 12] * 9], [[0] * 4 + [1] * 14], [[-0.25] * 18]),
]  # fmt: skip


@pytest.mark.parametrize("baseline", ["none", "policy"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_each_call_gets_what_it_would_get_alone(baseline: Any, level: Any) -> None:
    tokenizer = load_tokenizer("byte-level")
    verifier: Verifier = TableVerifier(load_tokenizer("sentencepiece"))
    cme = CrossModelEntropy(verifier, tokenizer, CMEConfig(baseline=baseline, level=level))
    parts = asked_at_once(*(cme.score_async(*given) for given in ASKED))
    for given, part in zip(ASKED, parts, strict=True):
        assert isinstance(part, CMEBatch), part
        alone = cme(*given)
        for name in ("token_rewards", "sequence_rewards", "token_logprobs", "dropped_nats"):
            got, expected = getattr(part, name), getattr(alone, name)
            assert got.shape == expected.shape
            assert got.is_contiguous()
            assert (got - expected).abs().sum() < 1e-6
        assert part.mask.equal(alone.mask)
        assert part.sampled.equal(alone.sampled)
        assert [i.tolist() for i, _ in part.verifier_tokens] == [
            i.tolist() for i, _ in alone.verifier_tokens
        ]
        metrics = {name: x for name, x in part.metrics.items() if name not in TIMES}
        assert metrics == pytest.approx({name: alone.metrics[name] for name in metrics}, abs=1e-12)
    # By hand: the mean of a call's rewards is that of its own tokens.
    whole = parts[1]
    rewarded = whole.token_rewards[whole.mask].double().numpy()
    if level == "token":
        assert whole.metrics["token_reward_mean"] == pytest.approx(mean(rewarded), abs=1e-6)


def test_errors_name_rows_of_their_own_call() -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, CMEConfig())
    good = ["a", "b"], [[5], [6]]
    replies = asked_at_once(
        cme.score_async(*good),
        cme.score_async(["a", "b"], [[5], [6, 10**6]]),
        cme.score_async(["a"], [[5], [6]]),
        cme.score_async(["a", "b"], [[5], [6]], [[1]]),
        cme.score_async(*good),
    )
    first, unknown, unpaired, masks, last = replies
    assert isinstance(unknown, InputError)
    assert "response 1, position 1: id 1000000" in str(unknown)
    assert isinstance(unpaired, InputError)
    assert "got 1 prompts and 2 responses" in str(unpaired)
    assert isinstance(masks, InputError)
    assert "response_masks has 1 rows for 2 responses" in str(masks)
    for batch in (first, last):
        assert batch.sequence_rewards.equal(cme(*good).sequence_rewards)
