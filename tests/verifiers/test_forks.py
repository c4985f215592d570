"""Verifiers that a process has before it forks, in the processes that fork off it."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
from typing import Any

import numpy as np
import pytest
import torch
from endpoint_tools import assert_same, expected, fake
from fake_engines import Fault
from forks import in_a_fork
from stubs import GatedVerifier, TableVerifier, logprob_of
from tokenizer_kinds import load_tokenizer
from waiting import PATIENCE, eventually, until

from cme_reward import CrossModelEntropy, load_verifier
from cme_reward.verifiers.batching import BatchingVerifier
from cme_reward.verifiers.endpoint import EndpointVerifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore:.*fork:DeprecationWarning",  # of processes with threads, from Python 3.12 on
    ),
]
PROMPTS, RESPONSES = [[1, 2], [1, 2], [3]], [[4, 5], [6], [7, 8]]
EXPECTED = expected(PROMPTS, RESPONSES)


def test_a_server_answers_both_processes(engine: str, verifiers: Any) -> None:
    with fake(engine) as server:
        verifier = verifiers(engine, server)
        assert_same(verifier.logprobs(PROMPTS, RESPONSES), EXPECTED)
        for _ in range(2):  # the second time, the child forks off again
            nested = lambda: in_a_fork(lambda: verifier.logprobs(PROMPTS, RESPONSES))  # noqa: E731
            assert_same(nested(), EXPECTED)
            assert_same(in_a_fork(nested), EXPECTED)
            assert_same(verifier.logprobs(PROMPTS, RESPONSES), EXPECTED)

        def in_loop() -> Any:
            return asyncio.run(verifier.logprobs_async(PROMPTS, RESPONSES))

        assert_same(in_a_fork(in_loop), EXPECTED)
        before = len(server.requests)
        made = in_a_fork(lambda: _made_and_asked(engine, server))
        assert_same(made, EXPECTED)
        assert len(server.requests) > before
        assert_same(verifier.logprobs(PROMPTS, RESPONSES), EXPECTED)


def _made_and_asked(engine: str, server: Any) -> Any:
    with EndpointVerifier(engine, [server.url], tokenizer=server.tokenizer) as verifier:
        return verifier.logprobs(PROMPTS, RESPONSES)


def test_a_pool_of_forked_processes(verifiers: Any) -> None:
    with fake("vllm") as server:
        verifier = verifiers("vllm", server)
        with multiprocessing.get_context("fork").Pool(2, _keep, (verifier,)) as pool:
            for got in pool.map(_ask, range(4), chunksize=1):
                assert_same(got, EXPECTED)


_kept: list[Any] = []


def _keep(verifier: Any) -> None:
    _kept[:] = [verifier]


def _ask(_: int) -> Any:
    return _kept[0].logprobs(PROMPTS, RESPONSES)


def test_a_fork_in_the_middle_of_requests_leaves_them_alone(engine: str, verifiers: Any) -> None:
    """Both processes share open connections, and what the loop waits on."""
    with fake(engine) as server:
        verifier = verifiers(engine, server, concurrency=2)
        server.fault = lambda n, body: Fault(delay=0.1)
        many = [[k] for k in range(20)], [[k, k + 1] for k in range(20)]
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(verifier.logprobs(*many)))
        before = len(server.requests)
        asking.start()
        assert eventually(lambda: len(server.requests) > before + 2)

        def child() -> Any:
            got = verifier.logprobs(PROMPTS, RESPONSES)
            verifier.close()
            gc.collect()
            return got

        assert_same(in_a_fork(child), EXPECTED)
        asking.join(PATIENCE)
        assert_same(answers[0], expected(*many))
        assert_same(verifier.logprobs(PROMPTS, RESPONSES), EXPECTED)


def test_a_replica_lost_at_the_fork_is_found_again(verifiers: Any) -> None:
    with fake("vllm") as a:
        b = fake("vllm")
        verifier = verifiers("vllm", a, b)
        b.close()
        many = [[k] for k in range(8)], [[k, k + 1] for k in range(8)]
        assert_same(verifier.logprobs(*many), expected(*many))
        with fake("vllm", port=b.port) as again:

            def child() -> Any:
                got = verifier.logprobs(PROMPTS, RESPONSES)
                found = eventually(lambda: all(r.trusted for r in verifier._replicas.replicas))
                return got, found

            got, found = in_a_fork(child)
            assert_same(got, EXPECTED)
            assert found
            assert len(again.requests) > 0


def test_closed_before_the_fork_stays_closed(engine: str) -> None:
    with fake(engine) as server:
        verifier = EndpointVerifier(engine, [server.url], tokenizer=server.tokenizer)
        verifier.close()
        in_a_fork(verifier.close)
        left = EndpointVerifier(engine, [server.url], tokenizer=server.tokenizer)
        in_a_fork(left.close)
        assert_same(left.logprobs(PROMPTS, RESPONSES), EXPECTED)
        left.close()


def test_calls_that_wait_for_a_verifier_stay_in_the_first_process() -> None:
    inner = GatedVerifier()
    with BatchingVerifier(inner) as shared:
        answers: list[Any] = []
        asking = [
            threading.Thread(target=lambda: answers.append(shared.logprobs([[1]], [[2]])))
            for _ in range(3)
        ]
        asking[0].start()
        assert inner.busy.wait(PATIENCE)
        for thread in asking[1:]:
            thread.start()
        until(lambda: shared.waiting == 2)

        def child() -> Any:
            inner.gate.set()
            return shared.logprobs([[5]], [[6, 7]]), shared.waiting

        with shared._lock:  # as another thread might hold it, for too short to catch it at that
            (got,), waiting = in_a_fork(child)
        np.testing.assert_array_equal(got, logprob_of(np.array([6, 7])))
        assert waiting == 0
        inner.gate.set()
        for thread in asking:
            thread.join(PATIENCE)
        assert [len(answer) for answer in answers] == [1, 1, 1]
        in_a_fork(shared.close)
        shared.logprobs([[1]], [[2]])


def test_rewards_of_coroutines_in_a_fork() -> None:
    tokenizer = load_tokenizer("byte-level")
    cme = CrossModelEntropy(TableVerifier(tokenizer), tokenizer)

    def rewards() -> list[float]:
        return asyncio.run(cme.score_async(["Why?"], [[5, 6, 7]])).sequence_rewards.tolist()

    assert in_a_fork(rewards) == rewards() == in_a_fork(rewards)


def test_a_verifier_in_process_that_was_at_work() -> None:
    """It is in the middle of a call, and the threads that torch keeps do not come along."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    verifier: Any = load_verifier("embedded", device="cpu")
    asked = [[5] * 300] * 8, [[7] * 50] * 8
    here = verifier.logprobs(*asked)
    busy, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread() is asking:
            busy.set()
            assert go_on.wait(PATIENCE)

    asking = threading.Thread(target=verifier.logprobs, args=asked)
    hook = verifier.model.base_model.register_forward_hook(hold)
    asking.start()
    assert busy.wait(PATIENCE)
    there, n = in_a_fork(lambda: (verifier.logprobs(*asked), torch.get_num_threads()))
    go_on.set()
    asking.join(PATIENCE)
    hook.remove()
    torch.set_num_threads(threads)
    assert n == 1
    for got, wanted in zip(there, here, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
