"""Callers that share one verifier, and rewards asked for by coroutines."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_engines import FakeEngine
from stubs import GatedVerifier, TableVerifier, logprob_of
from tokenizer_kinds import load_tokenizer
from waiting import PATIENCE, until

from cme_reward import CMEBatch, CMEConfig, ConfigError, CrossModelEntropy, VerifierError
from cme_reward.reward import ALONE
from cme_reward.verifiers import Ensemble, load_verifier
from cme_reward.verifiers.batching import BatchingVerifier
from cme_reward.verifiers.endpoint import EndpointVerifier


def waits(shared: BatchingVerifier, n: int) -> Callable[[], bool]:
    return lambda: shared.waiting == n


def queue_up(
    shared: BatchingVerifier, calls: list[list[list[int]]], pool: ThreadPoolExecutor
) -> list[Any]:
    """Calls that have come in, in this order, while the first of them is being answered."""
    inner = shared.verifier
    assert isinstance(inner, GatedVerifier)
    answers = []
    for k, prompts in enumerate(calls):
        answers.append(pool.submit(shared.logprobs, prompts, [[k, k + 1]] * len(prompts)))
        if k == 0:
            assert inner.busy.wait(PATIENCE)
        until(waits(shared, k))
    return answers


def test_calls_that_wait_are_merged_and_each_gets_its_own_answer() -> None:
    inner = GatedVerifier()
    with BatchingVerifier(inner) as shared, ThreadPoolExecutor(8) as pool:
        answers = queue_up(shared, [[[k]] * (1 + k % 2) for k in range(6)], pool)
        inner.gate.set()
        for k, answer in enumerate(answers):
            rows = answer.result(PATIENCE)
            assert len(rows) == 1 + k % 2
            for row in rows:
                np.testing.assert_array_equal(row, logprob_of(np.array([k, k + 1])))
    assert [len(call) for call in inner.calls] == [1, 8]


def test_the_oldest_goes_first_and_takes_its_prompts_other_rollouts_along() -> None:
    inner = GatedVerifier()
    a, b, c = [1] * 10, [2] * 10, [3] * 10
    # A call of a has 10 + 2 tokens, and a second one 2 more: 16 hold three rollouts of one prompt.
    with BatchingVerifier(inner, max_batch_tokens=16) as shared, ThreadPoolExecutor(8) as pool:
        answers = queue_up(shared, [[c], [a], [b], [a], [c], [a], [b]], pool)
        inner.gate.set()
        for answer in answers:
            answer.result(PATIENCE)
    assert inner.calls == [[c], [a, a, a], [b, b], [c]]


def test_a_call_above_the_budget_is_still_answered() -> None:
    inner = GatedVerifier()
    inner.gate.set()
    with BatchingVerifier(inner, max_batch_tokens=1) as shared:
        (row,) = shared.logprobs([[5] * 50], [[1, 2, 3]])
    np.testing.assert_array_equal(row, logprob_of(np.array([1, 2, 3])))


class Timed(GatedVerifier):
    """On a clock of its own, its calls take so many seconds, one after the other."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.now = 0.0
        self.seconds = iter(seconds)

    def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
        answers = super().logprobs(prompts, responses)
        self.now += next(self.seconds)
        return answers


def test_a_verifier_that_lingers_waits_for_those_who_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The second call takes longer than others take to come in; who did not come back after the
    # third is waited for as long as that took; the fourth one's caller is alone.
    inner = Timed(0.0, PATIENCE, 0.01, 1000 * PATIENCE, 0.0)
    clock = SimpleNamespace(perf_counter=lambda: inner.now)
    monkeypatch.setattr("cme_reward.verifiers.batching.time", clock)
    with BatchingVerifier(inner, linger_seconds=PATIENCE) as shared, ThreadPoolExecutor(8) as pool:
        answers = queue_up(shared, [[[1]], [[2]], [[3]]], pool)
        inner.gate.set()
        for answer in answers:
            answer.result(PATIENCE)
        assert inner.calls == [[[1]], [[2], [3]]]
        again = [pool.submit(shared.logprobs, [[4]], [[1]])]
        until(waits(shared, 1))
        again.append(pool.submit(shared.logprobs, [[5]], [[1]]))
        for answer in again:
            answer.result(PATIENCE)
        assert inner.calls[2:] == [[[4], [5]]]
        # One of them does not come back, and is waited for as long as the last call took.
        pool.submit(shared.logprobs, [[6]], [[1]]).result(PATIENCE)
        # Who is alone does not wait.
        pool.submit(shared.logprobs, [[7]], [[1]]).result(PATIENCE)
        assert inner.calls[3:] == [[[6]], [[7]]]


def test_nobody_lingers_over_what_the_budget_leaves() -> None:
    inner = GatedVerifier()
    shared = BatchingVerifier(inner, max_batch_tokens=1, linger_seconds=1000 * PATIENCE)
    with shared, ThreadPoolExecutor(8) as pool:
        answers = queue_up(shared, [[[1]], [[2]], [[3]], [[4]]], pool)
        inner.gate.set()
        for answer in answers:
            answer.result(PATIENCE)
    assert inner.calls == [[[1]], [[2]], [[3]], [[4]]]


def test_only_the_guilty_call_fails() -> None:
    inner = GatedVerifier()
    with BatchingVerifier(inner) as shared, ThreadPoolExecutor(8) as pool:
        answers = queue_up(shared, [[[1]], [[2]], [[13]], [[3]]], pool)
        inner.gate.set()
        for k in (0, 1, 3):
            np.testing.assert_array_equal(
                answers[k].result(PATIENCE)[0], logprob_of(np.array([k, k + 1]))
            )
        with pytest.raises(VerifierError, match="does not like 13"):
            answers[2].result(PATIENCE)


def test_too_few_answers_do_not_shift_those_of_others() -> None:
    class Forgetful(TableVerifier):
        def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
            return super().logprobs(prompts, responses)[1:]

    with (
        BatchingVerifier(Forgetful(load_tokenizer("byte-level"))) as shared,
        pytest.raises(VerifierError, match="answered 1 of 2"),
    ):
        shared.logprobs([[1], [2]], [[3], [4]])
    with pytest.raises(VerifierError, match="1 prompts for 2 responses"):
        shared.logprobs([[1]], [[3], [4]])


def test_a_call_that_is_cancelled_while_it_waits_never_runs() -> None:
    inner = GatedVerifier()

    async def main() -> None:
        first = asyncio.create_task(shared.logprobs_async([[1]], [[2]]))
        await asyncio.to_thread(inner.busy.wait, PATIENCE)
        second = asyncio.create_task(shared.logprobs_async([[7]], [[2]]))
        third = asyncio.create_task(shared.logprobs_async([[8]], [[2]]))
        await asyncio.to_thread(until, waits(shared, 2))
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        inner.gate.set()
        await asyncio.gather(first, third)

    with BatchingVerifier(inner) as shared:
        asyncio.run(main())
    assert inner.calls == [[[1]], [[8]]]


def test_closing_fails_what_waits_and_everything_after() -> None:
    inner = GatedVerifier()
    shared = BatchingVerifier(inner)
    with ThreadPoolExecutor(8) as pool:
        running, waiting = queue_up(shared, [[[1]], [[2]]], pool)
        closing = pool.submit(shared.close)
        with pytest.raises(VerifierError, match="closed"):
            waiting.result(PATIENCE)
        inner.gate.set()
        assert len(running.result(PATIENCE)) == 1
        closing.result(PATIENCE)
    with pytest.raises(VerifierError, match="closed"):
        shared.logprobs([[1]], [[2]])
    shared.close()


def test_options_are_checked_and_pickled() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens=0"):
        BatchingVerifier(TableVerifier(load_tokenizer("byte-level")), max_batch_tokens=0)
    with pytest.raises(ConfigError, match="linger_seconds=-1"):
        BatchingVerifier(TableVerifier(load_tokenizer("byte-level")), linger_seconds=-1)
    embedded = load_verifier("embedded")
    assert not isinstance(embedded, Ensemble)
    shared = BatchingVerifier(embedded, max_batch_tokens=77, linger_seconds=0.5)
    copy = pickle.loads(pickle.dumps(shared))
    assert copy.max_batch_tokens == 77
    assert copy.linger_seconds == 0.5
    np.testing.assert_allclose(
        copy.logprobs([[5, 6]], [[7, 8]])[0], shared.logprobs([[5, 6]], [[7, 8]])[0]
    )


def test_its_thread_ends_with_it() -> None:
    inner = GatedVerifier()
    inner.gate.set()
    before = set(threading.enumerate())
    shared = BatchingVerifier(inner)
    shared.logprobs([[1]], [[2]])
    (thread,) = set(threading.enumerate()) - before
    del shared
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


# ---- coroutines


def rollouts(tokenizer: Any, n: int = 12) -> tuple[list[str], list[list[int]]]:
    texts = [f"Answer {k}: {'so it goes, ' * (k % 5)}the end é {k}." for k in range(n)]
    return [f"Question {k // 4}?" for k in range(n)], [
        tokenizer.encode(text, add_special_tokens=False) for text in texts
    ]


def one_by_one(cme: CrossModelEntropy, prompts: list[str], ids: list[list[int]]) -> list[CMEBatch]:
    async def main() -> list[CMEBatch]:
        return await asyncio.gather(
            *(cme.score_async([p], [row]) for p, row in zip(prompts, ids, strict=True))
        )

    return asyncio.run(main())


def assert_same_rewards(parts: list[CMEBatch], whole: CMEBatch, atol: float) -> None:
    for b, part in enumerate(parts):
        T = part.token_rewards.shape[1]
        torch.testing.assert_close(
            part.token_rewards[0], whole.token_rewards[b, :T], atol=atol, rtol=0
        )
        assert torch.equal(part.mask[0], whole.mask[b, :T])
        torch.testing.assert_close(
            part.sequence_rewards[0], whole.sequence_rewards[b], atol=atol, rtol=0
        )


@pytest.mark.parametrize("spec", ["embedded", "embedded+random:EMBEDDED"])
def test_coroutines_get_the_rewards_of_one_call(spec: str) -> None:
    from cme_reward import verifiers

    folder = f"{verifiers.__path__[0]}/embedded"
    verifier = load_verifier(spec.replace("EMBEDDED", folder))
    tokenizer = load_tokenizer("byte-level")
    prompts, ids = rollouts(tokenizer)
    cme = CrossModelEntropy(verifier, tokenizer)
    assert_same_rewards(one_by_one(cme, prompts, ids), cme(prompts, ids), atol=1e-4)


def test_rollouts_are_scored_while_others_are_generated() -> None:
    inner = GatedVerifier()
    tokenizer = inner.tokenizer
    prompts, ids = rollouts(tokenizer)
    cme = CrossModelEntropy(inner, tokenizer)

    async def main() -> list[CMEBatch]:
        first = asyncio.create_task(cme.score_async(prompts[:1], ids[:1]))
        await asyncio.to_thread(inner.busy.wait, PATIENCE)
        others = []
        for k in range(1, len(ids)):  # "generated" while the verifier is at work
            others.append(asyncio.create_task(cme.score_async([prompts[k]], [ids[k]])))
            await asyncio.sleep(0)
        assert not first.done()
        shared = cme.members[0].shared
        await asyncio.to_thread(until, waits(shared, len(others)))
        inner.gate.set()
        return await asyncio.gather(first, *others)

    parts = asyncio.run(main())
    assert [len(call) for call in inner.calls] == [1, len(ids) - 1]
    assert_same_rewards(parts, cme(prompts, ids), atol=0)


def test_only_long_responses_are_worth_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and aligning them would keep the event loop from other rollouts."""
    inner = GatedVerifier()
    inner.gate.set()
    cme = CrossModelEntropy(inner, inner.tokenizer)
    member, here = cme.members[0], threading.get_ident()
    seen: list[bool] = []
    for owner, name in ((cme, "_prepared"), (member, "ask"), (member, "read"),
                        (cme, "_finished")):  # fmt: skip
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *args, original=original: (
                seen.append(threading.get_ident() == here) or original(*args)
            ),
        )
    for n, in_the_loop in ((ALONE, True), (ALONE + 1, False)):
        seen.clear()
        batch = asyncio.run(cme.score_async(["Why?"], [[5] * n]))
        assert batch.mask.sum() == n
        assert seen == [in_the_loop] * 4


def test_an_endpoint_is_asked_directly() -> None:
    tokenizer = load_tokenizer("byte-level")
    prompts, ids = rollouts(tokenizer)
    with (
        FakeEngine("vllm", tokenizer) as server,
        EndpointVerifier("vllm", [server.url], tokenizer=tokenizer) as verifier,
    ):
        cme = CrossModelEntropy(verifier, tokenizer)
        assert_same_rewards(one_by_one(cme, prompts, ids), cme(prompts, ids), atol=1e-6)
        assert cme.members[0].shared is verifier


def test_an_error_reaches_the_one_who_asked() -> None:
    inner = GatedVerifier()
    inner.gate.set()
    cme = CrossModelEntropy(inner, inner.tokenizer)
    bad = inner.tokenizer.decode([13])

    async def main() -> tuple[Any, Any]:
        return await asyncio.gather(
            cme.score_async(["fine"], [[5]]),
            cme.score_async([bad], [[5]]),
            return_exceptions=True,
        )

    fine, error = asyncio.run(main())
    assert isinstance(fine, CMEBatch)
    assert isinstance(error, VerifierError)


def test_threads_share_a_reward() -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(load_verifier("embedded"), tokenizer)
    prompts, ids = rollouts(tokenizer)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda p, row: cme([p], [row]), prompts, ids))
    assert_same_rewards(parts, cme(prompts, ids), atol=1e-4)


def test_a_prompt_is_rendered_once_over_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer, CMEConfig())
    member = cme.members[0]
    rendered = []
    original = member.format.render
    monkeypatch.setattr(
        member.format, "render", lambda prompt, *_: rendered.append(prompt) or original(prompt)
    )
    for _ in range(3):
        cme(["one", "two", "one"], [[5], [6], [7]])
    assert rendered == ["one", "two"]
    member._rendered.size = 2
    cme(["three"], [[5]])  # "two" leaves, which was used before the last "one"
    cme(["one"], [[5]])
    cme(["two"], [[5]])
    assert rendered == ["one", "two", "three", "two"]
    assert len(member._rendered) == 2


# What is no error to pass on: it would end the thread or the task that it is raised in.
ENDS = [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit(),
        StopIteration(1), BaseException("of its own")]  # fmt: skip


class Ending(GatedVerifier):
    """Ends its calls with 13 in them in a way that no verifier should."""

    def __init__(self, end: BaseException) -> None:
        super().__init__()
        self.end = end

    def logprobs(self, prompts: Any, responses: Any) -> list[np.ndarray]:
        try:
            return super().logprobs(prompts, responses)
        except VerifierError:
            raise self.end from None


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_whatever_a_call_ends_in_nobody_waits_for_ever(end: BaseException) -> None:
    inner = Ending(end)
    said = rf"table: the call ended in {type(end).__name__}\(.*no verifier should raise"
    with BatchingVerifier(inner) as shared, ThreadPoolExecutor(8) as pool:
        threads = queue_up(shared, [[[1]], [[2]], [[13]]], pool)

        async def coroutines() -> list[Any]:
            tasks = [asyncio.create_task(shared.logprobs_async([[k]], [[k]])) for k in (13, 4, 13)]
            await asyncio.to_thread(until, waits(shared, 5))
            inner.gate.set()
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)

        first, fine, second = asyncio.run(coroutines())
        np.testing.assert_array_equal(fine[0], logprob_of(np.array([4])))
        for error in (first, second, threads[2].exception(PATIENCE)):
            assert isinstance(error, VerifierError)
            assert re.match(said, str(error))
            assert error.__cause__ is end
        for k in (0, 1):
            np.testing.assert_array_equal(
                threads[k].result(PATIENCE)[0], logprob_of(np.array([k, k + 1]))
            )
        # One alone, and a later one that is fine.
        with pytest.raises(VerifierError, match=said):
            pool.submit(shared.logprobs, [[13]], [[1]]).result(PATIENCE)
        assert len(pool.submit(shared.logprobs, [[5]], [[1]]).result(PATIENCE)) == 1


@pytest.mark.parametrize("end", [SystemExit(3), MemoryError("full")], ids=repr)
def test_a_thread_that_ends_on_its_own_leaves_nobody_waiting(
    end: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for what fails between two calls of the verifier."""
    inner = GatedVerifier()
    with BatchingVerifier(inner) as shared, ThreadPoolExecutor(8) as pool:
        running, *waiting = queue_up(shared, [[[1]], [[2]], [[3]]], pool)

        def fail(*_: Any) -> Any:
            monkeypatch.undo()
            raise end

        monkeypatch.setattr("cme_reward.verifiers.batching._chosen", fail)
        inner.gate.set()
        assert len(running.result(PATIENCE)) == 1
        for answer in waiting:
            with pytest.raises((VerifierError, MemoryError), match=r"SystemExit\(3\)|full"):
                answer.result(PATIENCE)
        assert len(pool.submit(shared.logprobs, [[5]], [[1]]).result(PATIENCE)) == 1


def test_a_thread_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = GatedVerifier()
    inner.gate.set()
    with BatchingVerifier(inner) as shared:
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(VerifierError, match="takes no call: can't start new thread"):
                shared.logprobs([[1]], [[2]])
        assert len(shared.logprobs([[1]], [[2]])) == 1
