"""What goes wrong with servers and networks: no wrong number, no response lost, bounded waiting."""

from __future__ import annotations

import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_engines
import pytest
from endpoint_tools import assert_same, batch, expected, fake
from fake_engines import FakeEngine, Fault
from tokenizer_kinds import load_tokenizer
from waiting import eventually

from cme_reward import VerifierError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]


def after_start(fault: Callable[[int], Fault | None]) -> Callable[[int, Any], Fault | None]:
    """Faults from the end of the handshake on; `fault` counts from there."""
    state = {"start": None}

    def decide(n: int, body: Any) -> Fault | None:
        start = state["start"]
        return fault(n - start) if start is not None else None

    decide.__dict__["state"] = state
    return decide


def started(server: FakeEngine) -> None:
    server.fault.__dict__["state"]["start"] = len(server.requests)


def full_batch(
    groups: int = 10, rollouts: int = 4, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    prompts, responses = batch(groups, rollouts, seed)
    return prompts, [row or [5] for row in responses]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(hang_up=True), id="connection-closed"),
        pytest.param(Fault(cut_body=True), id="body-cut-off"),
        pytest.param(Fault(truncate=True), id="truncated-json"),
        pytest.param(Fault(status=429, message="slow down"), id="429"),
        pytest.param(Fault(status=500, message="boom"), id="500"),
        pytest.param(Fault(status=503, message="loading"), id="503"),
    ],
)
def test_passing_trouble_costs_time_and_nothing_else(
    engine: str, fault: Fault, verifiers: Any
) -> None:
    """One request in three fails, those that prove the server again among them."""
    dice = random.Random(0)
    with fake(
        engine, fault=after_start(lambda n: fault if dice.random() < 1 / 3 else None)
    ) as server:
        verifier = verifiers(engine, server)
        started(server)
        prompts, responses = full_batch(5, 3)
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))


def test_a_storm_of_429_is_waited_out_as_long_as_the_server_asks(
    engine: str, verifiers: Any
) -> None:
    busy = Fault(status=429, message="overloaded", headers={"Retry-After": "0.6"})
    with fake(engine, fault=after_start(lambda n: busy if n < 20 else None)) as server:
        verifier = verifiers(engine, server)
        started(server)
        prompts, responses = full_batch(20, 1)
        began = time.monotonic()
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        assert time.monotonic() - began >= 0.6  # a lower bound: what Retry-After asked for


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=429, message="overloaded"), "answered 429: overloaded"),
        (Fault(status=500, message="boom"), "answered 500: boom"),
        (Fault(hang_up=True), "disconnected"),
        (Fault(truncate=True), "is not JSON"),
        (Fault(delay=60), "ReadTimeout|allowed in all"),
    ],
    ids=["429", "500", "closed", "truncated", "hangs"],
)
def test_trouble_without_end_is_given_up_in_time(
    engine: str, fault: Fault, message: str, verifiers: Any
) -> None:
    with fake(engine, fault=after_start(lambda n: fault)) as server:
        verifier = verifiers(engine, server, total_seconds=2.0, request_seconds=1.0)
        started(server)
        prompts, responses = full_batch(3, 2)
        began = time.monotonic()
        with pytest.raises(VerifierError, match=rf"(?s)response \d.*{server.port}") as caught:
            verifier.logprobs(prompts, responses)
        # Far from the 60 s of the server that hangs, however slow this machine is.
        assert time.monotonic() - began < 30
        assert re.search(message, str(caught.value))
        assert str(caught.value).count("\n") <= 2  # one message, a line for each server


def wrong_id(engine: str) -> Callable[[Any], Any]:
    def change(reply: Any) -> Any:
        if engine == "vllm":
            entries = reply["choices"][0]["prompt_logprobs"]
            ((_, value),) = entries[-1].items()
            entries[-1] = {"77777": value}
        else:
            reply["meta_info"]["input_token_logprobs"][-1][1] = 77777
        return reply

    return change


def last_logprob(engine: str, value: Any) -> Callable[[Any], Any]:
    def change(reply: Any) -> Any:
        if engine == "vllm":
            next(iter(reply["choices"][0]["prompt_logprobs"][-1].values()))["logprob"] = value
        else:
            reply["meta_info"]["input_token_logprobs"][-1][0] = value
        return reply

    return change


def one_short(engine: str) -> Callable[[Any], Any]:
    def change(reply: Any) -> Any:
        if engine == "vllm":
            reply["choices"][0]["prompt_logprobs"].pop()
        else:
            reply["meta_info"]["input_token_logprobs"].pop()
        return reply

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_id, "scored another text"),
        (one_short, r"expected .* for \d+ tokens, got \d+ of them"),
        (lambda engine: last_logprob(engine, float("nan")), "log-prob nan"),
        (lambda engine: last_logprob(engine, float("-inf")), "log-prob -inf"),
        (lambda engine: last_logprob(engine, None), "no log-prob of token"),
        (lambda engine: lambda reply: {"other": 1}, "is this a"),
        (lambda engine: lambda reply: [], "is this a"),
    ],
    ids=["wrong-id", "one-short", "nan", "minus-infinity", "null", "other-reply", "no-object"],
)
def test_a_wrong_answer_is_an_error_at_once_and_names_the_response(
    engine: str, make: Any, message: str, verifiers: Any
) -> None:
    wrong = Fault(change=make(engine))
    with fake(engine, fault=after_start(lambda n: wrong if n == 2 else None)) as server:
        verifier = verifiers(engine, server, concurrency=1)
        started(server)
        with pytest.raises(VerifierError, match=message) as caught:
            verifier.logprobs([[1], [2], [3], [4]], [[5], [6], [7, 8], [9]])
        assert "response 2: " in str(caught.value)
        assert len(server.requests) - server.fault.__dict__["state"]["start"] <= 4  # no second try
        # And the verifier goes on.
        assert_same(verifier.logprobs([[1]], [[5]]), expected([[1]], [[5]]))


def test_minus_infinity_as_vllm_writes_it(verifiers: Any) -> None:
    wrong = Fault(change=last_logprob("vllm", -9999.0))
    with fake("vllm", fault=after_start(lambda n: wrong)) as server:
        verifier = verifiers("vllm", server)
        started(server)
        with pytest.raises(VerifierError, match="log-prob -inf for token 1"):
            verifier.logprobs([[1]], [[5, 6]])


def test_a_refusal_is_not_tried_again(engine: str, verifiers: Any) -> None:
    refusal = Fault(status=400, message="no such thing")
    with fake(engine, fault=after_start(lambda n: refusal)) as server:
        verifier = verifiers(engine, server)
        started(server)
        with pytest.raises(VerifierError, match=r"response 0.*400: no such thing"):
            verifier.logprobs([[1]], [[5]])
        assert len(server.requests) == server.fault.__dict__["state"]["start"] + 1


def test_one_of_three_replicas_is_dead_from_the_start(
    engine: str, verifiers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dead = fake(engine)
    dead.close()
    with fake(engine) as a, fake(engine) as b:
        verifier = verifiers(engine, a, dead, b)
        assert f"going on without {dead.url}" in caplog.text
        prompts, responses = full_batch()
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))


def test_a_replica_dies_and_comes_back(engine: str, verifiers: Any) -> None:
    with fake(engine) as a:
        b = fake(engine)
        verifier = verifiers(engine, a, b)
        b.fault = lambda n, body: Fault(hang_up=True)
        prompts, responses = full_batch()
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        b.close()
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        with fake(engine, port=b.port) as again:
            assert eventually(lambda: len(again.requests) > 0)
            proofs = len(again.requests)
            assert eventually(lambda: verifier._replicas.replicas[1].trusted)
            prompts, responses = full_batch(seed=1)  # others: those before have moved to `a`
            assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
            assert len(again.requests) > proofs


def test_another_model_that_comes_up_at_the_same_address_is_not_used(
    engine: str, verifiers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    with fake(engine) as a:
        b = fake(engine)
        verifier = verifiers(engine, a, b)
        b.fault = lambda n, body: Fault(hang_up=True)
        prompts, responses = full_batch()
        verifier.logprobs(prompts, responses)
        b.close()
        with fake(engine, port=b.port, shift=1.0) as other:
            assert eventually(lambda: "not used again" in caplog.text)
            proofs = len(other.requests)
            assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
            assert len(other.requests) == proofs


def test_a_slow_replica_gets_less_work(engine: str, verifiers: Any) -> None:
    with fake(engine) as quick, fake(engine) as slow:
        verifier = verifiers(engine, quick, slow, concurrency=4)
        slow.fault = lambda n, body: Fault(delay=0.3)
        quick.fault = lambda n, body: Fault(delay=0.01)
        before = len(quick.requests), len(slow.requests)
        prompts, responses = full_batch(40, 1)
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        assert len(quick.requests) - before[0] > 2 * (len(slow.requests) - before[1])


def test_no_server_at_all_is_said_in_time(engine: str, verifiers: Any) -> None:
    dead = fake(engine)
    dead.close()
    began = time.monotonic()
    says = rf"no verifier answers after 0\.5 s; expected the URL of a server .*\n.*{dead.port}"
    with pytest.raises(VerifierError, match=says):
        verifiers(engine, dead, start_seconds=0.5)
    assert time.monotonic() - began < 20


def test_a_server_that_starts_late_is_waited_for(engine: str, verifiers: Any) -> None:
    late = fake(engine)
    late.close()
    made: list[FakeEngine] = []
    timer = threading.Timer(0.7, lambda: made.append(fake(engine, port=late.port)))
    timer.start()
    verifier = verifiers(engine, late)
    assert_same(verifier.logprobs([[1]], [[2]]), expected([[1]], [[2]]))
    timer.join()
    made[0].close()


def test_killed_in_the_middle_of_a_batch_and_restarted(
    engine: str, verifiers: Any, tmp_path: Path
) -> None:
    """A process of its own, ended by SIGKILL while requests are in flight."""
    tokenizer = load_tokenizer("byte-level")
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, fake_engines.__file__]
    command += [engine, str(port), str(tmp_path)]

    def serve() -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    class Address:
        """Of a server in another process."""

        def __init__(self) -> None:
            self.tokenizer, self.url = tokenizer, f"http://127.0.0.1:{port}"

    first = serve()
    second = None
    try:
        verifier = verifiers(engine, Address(), concurrency=2)
        prompts, responses = full_batch(20, 2)
        answers: list[Any] = []
        scoring = threading.Thread(
            target=lambda: answers.append(verifier.logprobs(prompts, responses))
        )
        scoring.start()
        time.sleep(0.3)  # 40 requests of 0.05 s, two at a time: in the middle
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not answers
        second = serve()
        scoring.join(timeout=60)
        assert_same(answers[0], expected(prompts, responses))
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()
