"""Which replica a request goes to, when, and how long it may take."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from endpoint_tools import assert_same, expected, fake
from fake_engines import FakeEngine, Fault
from waiting import eventually

from cme_reward import VerifierError
from cme_reward.verifiers.replicas import Replicas, Unreachable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
N = 12
PROMPTS, RESPONSES = [[k] for k in range(N)], [[k, k + 1] for k in range(N)]


def slow(n: int, body: Any) -> Fault:
    """One after the other, 12 of these take 3 s."""
    return Fault(delay=0.25)


@pytest.mark.parametrize("way", ["one-call", "threads", "coroutines", "both"])
def test_a_slow_server_is_not_a_lost_one(
    way: str, verifiers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The last of the requests waits twice as long as any of them may take."""
    with fake("vllm") as server:
        verifier = verifiers("vllm", server, concurrency=1, total_seconds=1.5)
        server.fault, server.most_in_flight = slow, 0

        async def coroutines(start: int) -> list[Any]:
            calls = zip(PROMPTS[start:], RESPONSES[start:], strict=True)
            return await asyncio.gather(*(verifier.logprobs_async([p], [r]) for p, r in calls))

        if way == "one-call":
            got = verifier.logprobs(PROMPTS, RESPONSES)
        else:
            by_threads = {"threads": N, "coroutines": 0, "both": N // 2}[way]
            with ThreadPoolExecutor(N) as pool:
                calls = zip(PROMPTS[:by_threads], RESPONSES, strict=False)
                threads = [pool.submit(verifier.logprobs, [p], [r]) for p, r in calls]
                later = asyncio.run(coroutines(by_threads))
                got = [row for (row,) in [*(thread.result() for thread in threads), *later]]
        assert_same(got, expected(PROMPTS, RESPONSES))
        assert server.most_in_flight == 1
        assert "lost" not in caplog.text


def test_concurrency_is_each_replicas_own(verifiers: Any) -> None:
    short = lambda n, body: Fault(delay=0.02)  # noqa: E731
    with fake("vllm") as a, fake("vllm") as b:
        verifier = verifiers("vllm", a, b, concurrency=2)
        for server in (a, b):
            server.fault, server.most_in_flight = short, 0
        # The rollouts of one prompt: all on one of the two, which the other's slots are none of.
        prompts, responses = [[1, 2]] * 8, [[k] for k in range(8)]
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        assert sorted((a.most_in_flight, b.most_in_flight)) == [0, 2]
        assert_same(verifier.logprobs(PROMPTS, RESPONSES), expected(PROMPTS, RESPONSES))
        assert (a.most_in_flight, b.most_in_flight) == (2, 2)
        # One is lost while others wait for it: the one that is left gets no more for that.
        b.fault = lambda n, body: Fault(hang_up=True)
        prompts = [[100 + k] for k in range(N)]
        assert_same(verifier.logprobs(prompts, RESPONSES), expected(prompts, RESPONSES))
        assert a.most_in_flight == 2


@pytest.mark.parametrize(
    "fault",
    [Fault(delay=60), Fault(hang_up=True), Fault(status=500, message="boom")],
    ids=["hangs", "closed", "500"],
)
def test_a_dead_server_ends_all_who_wait_however_many(fault: Fault, verifiers: Any) -> None:
    """Each by itself would take a second, one after the other."""
    with fake("vllm") as server:
        verifier = verifiers("vllm", server, concurrency=1, total_seconds=1.0, request_seconds=1.0)
        server.fault = lambda n, body: fault

        async def all_at_once() -> list[Any]:
            calls = (verifier.logprobs_async([[k % 9]], [[5]]) for k in range(60))
            return await asyncio.gather(*calls, return_exceptions=True)

        began = time.monotonic()
        errors = asyncio.run(all_at_once())
        assert time.monotonic() - began < 30
        assert all(isinstance(error, VerifierError) for error in errors)
        assert any("waits for its turn" in str(error) for error in errors)
        assert all(server.url in str(error) for error in errors)
        # And once it answers again, so does the verifier.
        server.fault = lambda n, body: None
        assert eventually(lambda: answers(verifier))
        assert_same(verifier.logprobs([[1]], [[2]]), expected([[1]], [[2]]))


def answers(verifier: Any) -> bool:
    with suppress(VerifierError):
        verifier.logprobs([[1]], [[2]])
        return True
    return False


def test_a_call_that_is_cancelled_while_it_waits_gives_its_turn_up(verifiers: Any) -> None:
    gate = threading.Event()

    def wait(n: int, body: Any) -> None:
        assert gate.wait(30)

    with fake("vllm") as server:
        verifier = verifiers("vllm", server, concurrency=1)
        server.fault = wait
        before = len(server.requests)

        async def main() -> list[Any]:
            calls = [
                asyncio.create_task(verifier.logprobs_async([[k]], [[k, 5]])) for k in range(4)
            ]
            while len(server.requests) == before:
                await asyncio.sleep(0.01)
            calls[0].cancel()
            calls[2].cancel()
            await asyncio.sleep(0.05)
            gate.set()
            return await asyncio.gather(*calls, return_exceptions=True)

        got = asyncio.run(main())
        for k in (0, 2):
            assert isinstance(got[k], asyncio.CancelledError)
        for k in (1, 3):
            assert_same(got[k], expected([[k]], [[k, 5]]))
        # No turn is lost, and none is there that was not: one call at a time, as before.
        server.most_in_flight = 0
        four = [[k] for k in range(4)], [[k, 6] for k in range(4)]
        assert_same(verifier.logprobs(*four), expected(*four))
        assert server.most_in_flight == 1


def test_what_a_retry_leaves_too_little_time_for_is_not_lost(
    verifiers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The first try is refused until little is left, the second is slower than that."""
    with fake("vllm") as server:
        verifier = verifiers("vllm", server, total_seconds=1.0)
        start = len(server.requests)
        busy = Fault(status=429, message="overloaded", headers={"Retry-After": "0.7"})
        server.fault = lambda n, body: busy if n == start else Fault(delay=0.6)
        with pytest.raises(VerifierError, match="no answer within 1 s"):
            verifier.logprobs([[1]], [[2]])
        assert "lost" not in caplog.text
        assert_same(verifier.logprobs([[1]], [[2]]), expected([[1]], [[2]]))


def test_a_request_that_kills_servers_ends_by_itself() -> None:
    """The proof passes each time, so that there is always a server to go on with."""

    async def main() -> int:
        async def prove(replica: Any, exchange: Any) -> None:
            pass

        pool = Replicas(
            ["http://a", "http://b"], prove,
            headers={}, concurrency=1, request_seconds=1.0, total_seconds=1.0,
        )  # fmt: skip
        tries = 0

        async def exchange(replica: Any, method: str, path: str, body: Any = None) -> Any:
            nonlocal tries
            tries += body == "poison"
            if body == "poison":
                raise Unreachable("hung up")
            return {}

        pool.exchange = exchange  # type: ignore[method-assign]
        await pool.start(1.0)
        poison = asyncio.create_task(pool.post(lambda replica: ("/", "poison"), key=1))
        while not poison.done():
            await pool.post(lambda replica: ("/", "plain"), key=2)
            await asyncio.sleep(0.01)
        with pytest.raises(VerifierError, match="no answer within 1 s"):
            await poison
        await pool.close()
        return tries

    assert asyncio.run(main()) < 20


def test_a_proof_that_ends_in_anything_is_told(verifiers: Any) -> None:
    with fake("vllm") as a:
        b = FakeEngine("vllm", a.tokenizer)
        verifier = verifiers("vllm", a, b)

        async def prove(replica: Any, exchange: Any) -> None:  # no server can bring this about
            raise SystemExit("out of the model's own code")

        verifier._replicas._prove = prove
        for server in (a, b):
            server.fault = lambda n, body: Fault(hang_up=True)
        with pytest.raises(VerifierError, match=r"(?s)no verifier is left.*own code"):
            verifier.logprobs(PROMPTS, RESPONSES)
        b.close()
