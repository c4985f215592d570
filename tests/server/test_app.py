"""What the reward server answers, in this process."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import pytest
from server_tools import GOOD, IDS, Gated, refused, run, serving
from stubs import TableVerifier
from tokenizer_kinds import TEXTS, load_tokenizer
from waiting import PATIENCE, until

from cme_reward import CMEConfig, CrossModelEntropy, Ensemble, __version__, load_verifier
from cme_reward.server import create_app
from cme_reward.verifiers.base import Verifier

TOLERANCE = 1e-6
TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
WRITTEN = [t for t in TEXTS if t.strip() and "literal" not in t][:8]


@pytest.fixture(scope="module")
def embedded() -> Any:
    """In float64: in float32 it depends on the batch how 1e-5 of a token's reward is rounded."""
    return load_verifier("embedded", device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def generator() -> Any:
    return load_tokenizer("byte-level")


def ask(verifier: Any, tokenizer: Any, path: str, body: Any, **options: Any) -> Any:
    """The reply to one request."""

    async def test() -> Any:
        async with serving(verifier, tokenizer, **options) as client:
            if isinstance(body, bytes):
                headers = {"content-type": "application/json"}
                return await client.post(path, content=body, headers=headers)
            return await client.post(path, json=body)

    return run(test)


def table(name: str = "sentencepiece") -> Verifier:
    return TableVerifier(load_tokenizer(name))


def sampled(tokenizer: Any, text: str) -> list[int]:
    ids = CrossModelEntropy(table(), tokenizer).table.encode(text)[0].tolist()
    return [*ids, tokenizer.eos_token_id]


def test_rewards_of_ids_equal_those_in_process(embedded: Any, generator: Any) -> None:
    """Token by token, for many requests at a time, which the verifier scores in other batches."""
    ids = [sampled(generator, text) for text in WRITTEN]
    prompts = [[TALK, "Say something."][k % 2] for k in range(len(ids))]
    expected = CrossModelEntropy(embedded, generator)(prompts, ids)

    async def test() -> list[Any]:
        async with serving(embedded, generator) as client:
            bodies = [
                {("prompts" if isinstance(p, str) else "messages"): [p], "response_ids": [i]}
                for p, i in zip(prompts, ids, strict=True)
            ]
            replies = [client.post("/v1/score", json=body) for body in bodies * 3]
            return await asyncio.gather(*replies)

    for k, reply in enumerate(run(test)):
        b, got = k % len(ids), reply.json()
        length = len(ids[b])
        assert reply.status_code == 200
        assert got["level"] == "token"
        for name, rows in (("token_rewards", expected.token_rewards), ("masks", expected.mask)):
            assert got[name] == [pytest.approx(rows[b, :length].tolist(), abs=TOLERANCE)]
        for name in ("sequence_rewards", "dropped_nats"):
            assert got[name] == [pytest.approx(float(getattr(expected, name)[b]), abs=TOLERANCE)]


def test_prompts_are_texts_or_conversations(embedded: Any, generator: Any) -> None:
    """As the rows of a data set have them under that name."""
    prompts, ids = [TALK, "Say something."], [sampled(generator, text) for text in WRITTEN[:2]]
    expected = CrossModelEntropy(embedded, generator)(prompts, ids)
    body = {"prompts": prompts, "response_ids": ids}
    got = ask(embedded, generator, "/v1/score", body).json()
    assert got["sequence_rewards"] == pytest.approx(
        expected.sequence_rewards.tolist(), abs=TOLERANCE
    )


@pytest.mark.parametrize("messages", [None, TALK], ids=["read-back", "label"])
def test_openrlhf_gets_the_rewards_of_the_sampled_ids(
    embedded: Any, generator: Any, messages: Any
) -> None:
    """Query, prompt and label as OpenRLHF makes them; the verifier sees messages."""
    conversation = [{"role": "user", "content": "Größe?"}] if messages is None else messages
    rendered = generator.apply_chat_template(
        conversation if messages is None else [{"role": "user", "content": "Not this one."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = [sampled(generator, text) for text in WRITTEN]
    prompt_ids = generator.encode(rendered, add_special_tokens=False)
    queries = [generator.decode(prompt_ids + i, skip_special_tokens=False) for i in ids]
    expected = CrossModelEntropy(embedded, generator)([conversation] * len(ids), ids)
    label = None if messages is None else json.dumps(messages)
    n = len(ids)
    body = {"query": queries, "prompts": [rendered] * n, "labels": [label] * n, "new_field": 1}
    got = ask(embedded, generator, "/get_reward", body)
    assert got.status_code == 200
    assert got.headers["content-type"] == "application/json"
    rewards = expected.sequence_rewards.tolist()
    assert got.json()["rewards"] == pytest.approx(rewards, abs=TOLERANCE)
    scores = [math.exp(reward) for reward in rewards]
    assert got.json()["scores"] == pytest.approx(scores, abs=TOLERANCE)
    assert all(0 < score < 1 for score in got.json()["scores"])
    for values in got.json()["extra_logs"].values():
        assert len(values) == n
        assert all(isinstance(value, float) for value in values)


def test_openrlhfs_empty_request() -> None:
    """Its versions up to 0.11.1 send one to every server but the first."""
    got = ask(table(), load_tokenizer("byte-level"), "/get_reward", {"query": []})
    assert (got.status_code, got.json()) == (200, {"rewards": [], "scores": [], "extra_logs": {}})
    body = {"query": [], "prompts": [], "labels": []}
    got = ask(table(), load_tokenizer("byte-level"), "/get_reward", body)
    assert (got.status_code, got.json()) == (200, {"rewards": [], "scores": [], "extra_logs": {}})


@pytest.mark.parametrize(
    ("query", "prompt", "label", "message"),
    [
        (
            "<|im_start|>user\nhalf a prompt, yes",
            "<|im_start|>user\nhalf a prompt",
            None,
            "query 0: cannot read the prompt .* is markup .* as JSON in the label",
        ),
        ("something else", "a prompt", None, "query 0: the query 'something else' does not start"),
        ("a yes", "a", [{"role": "user", "content": 3}], "a message in the label is not one"),
        ("a yes", "a", [{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ("a yes", "a", json.dumps(TALK[:2]), "the messages in the label end with the assistant's"),
    ],
    ids=["markup", "other-prompt", "label-number", "label-surrogate", "label-answer"],
)
def test_what_openrlhf_may_not_send(query: str, prompt: str, label: Any, message: str) -> None:
    body = json.dumps({"query": [query], "prompts": [prompt], "labels": [label]}).encode()
    got = ask(table(), load_tokenizer("byte-level"), "/get_reward", body)
    refused(got, 422, "InputError", message)


@pytest.mark.parametrize(
    ("body", "status", "error", "message"),
    [
        (b"", 422, "ValidationError", "the body: Field required"),
        (b"{", 400, "InvalidJSON", "the body is not JSON: Expecting property name"),
        (b"\xff{}", 400, "HTTPError", "parsing the body"),
        (b"[" * 200_000, 400, "HTTPError", "parsing the body"),
        (b'{"prompts": [' + b"9" * 5000 + b"]}", 400, "HTTPError", "parsing the body"),
        ([GOOD], 422, "ValidationError", "the body: .*dictionary"),
        ({}, 422, "InputError", "got neither prompts nor messages; expected one of the two"),
        (GOOD | {"messages": [TALK]}, 422, "InputError", "got both prompts and messages"),
        (GOOD | IDS, 422, "InputError", "got both responses and response_ids"),
        (GOOD | {"prompts": "a"}, 422, "ValidationError", "prompts: Input should be a valid list"),
        (GOOD | {"prompts": [3]}, 422, "ValidationError", r"prompts\[0\]: .*valid string"),
        (GOOD | {"prompts": [[]]}, 422, "ValidationError", r"prompts\[0\]: .*at least 1 item"),
        (
            GOOD | {"prompts": [[{"role": "user", "contents": "a"}]]},
            422,
            "ValidationError",
            r"^prompts\[0\]\[0\].contents: unknown field; known: role, content, tool_calls",
        ),
        (GOOD | {"prompts": ["a", "b"]}, 422, "InputError", "got 2 prompts and 1 responses"),
        (
            GOOD | {"respones": ["b"]},
            422,
            "ValidationError",
            "respones: unknown field; known: prompts, messages, responses, ",
        ),
        (b'{"prompts":["\\ud800"],"responses":["b"]}', 422, "ValidationError", "half of a surrog"),
        (IDS | {"response_ids": [[5, "6"]]}, 422, "ValidationError", r"ids\[0\]\[1\]: .*integer"),
        (IDS | {"response_ids": [[-1]]}, 422, "InputError", "id -1 is not in the vocabulary"),
        (IDS | {"response_ids": [[5_000]]}, 422, "InputError", "id 5000 is not in the vocabulary"),
        (IDS | {"response_masks": [[1]]}, 422, "InputError", "response 0 has shape"),
        (GOOD | {"response_masks": [[1]]}, 422, "InputError", "goes by sampled tokens"),
        (IDS | {"append_eos": True}, 422, "InputError", "append_eos is for responses as text"),
        (GOOD | {"level": "word"}, 422, "ValidationError", "level: .*'token' or 'sequence'"),
        (
            {"messages": [[{"role": "user", "content": "a", "toolcalls": []}]]} | {"responses": []},
            422,
            "ValidationError",
            r"messages\[0\]\[0\].toolcalls: unknown field; known: role, content, tool_calls",
        ),
        ({"messages": [[]], "responses": ["b"]}, 422, "ValidationError", "at least 1 item"),
        (
            IDS | {"policy_logprobs": [[-1, float("nan")]]},
            422,
            "ValidationError",
            "finite number",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(body: Any, status: int, error: str, message: str) -> None:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    got = ask(table(), load_tokenizer("byte-level"), "/v1/score", body)
    refused(got, status, error, message)


def test_a_prompt_longer_than_the_context_does_not_end_a_run() -> None:
    """As surprising as a uniform guess, counted, and no error."""
    verifier = TableVerifier(load_tokenizer("sentencepiece"), max_length=20)
    body = {"prompts": ["word " * 100, "a"], "responses": ["b", "b"]}
    got = ask(verifier, load_tokenizer("byte-level"), "/v1/score", body)
    assert got.status_code == 200
    assert got.json()["truncated"] == 1
    uniform = -math.log(verifier.vocab_size)
    assert got.json()["sequence_rewards"][0] == pytest.approx(uniform, abs=TOLERANCE)
    assert got.json()["masks"][0] == [False]
    body = {"query": ["word " * 100 + "b"], "prompts": ["word " * 100], "labels": [None]}
    got = ask(verifier, load_tokenizer("byte-level"), "/get_reward", body)
    assert got.json()["rewards"] == [pytest.approx(uniform, abs=TOLERANCE)]
    assert got.json()["extra_logs"]["cme_truncated"] == [1.0]


def test_options_of_the_native_endpoint(embedded: Any, generator: Any) -> None:
    texts = ["one two", "three"]
    body = {"prompts": ["Count."], "responses": texts, "append_eos": True, "return_tokens": True}
    expected = CrossModelEntropy(embedded, generator)(
        ["Count."] * 2, [sampled(generator, text) for text in texts]
    )
    got = ask(embedded, generator, "/v1/score", body).json()
    rewards = expected.sequence_rewards.tolist()
    assert got["sequence_rewards"] == pytest.approx(rewards, abs=TOLERANCE)
    assert ["".join(row) for row in got["tokens"]] == [f"{text}<|im_end|>" for text in texts]
    got = ask(embedded, generator, "/v1/score", body | {"level": "sequence"}).json()
    assert got["sequence_rewards"] == pytest.approx(rewards, abs=TOLERANCE)
    assert got["level"] == "sequence"
    assert got["token_rewards"] is got["masks"] is None

    # What an environment wrote is no part of the reward.
    ids = sampled(generator, "one two")
    mask = [1, 0, *[1] * (len(ids) - 2)]
    expected = CrossModelEntropy(embedded, generator)(["Count."], [ids], [mask])
    body = {"prompts": ["Count."], "response_ids": [ids], "response_masks": [mask]}
    got = ask(embedded, generator, "/v1/score", body).json()
    rewards = expected.token_rewards[0].tolist()
    assert got["token_rewards"][0] == pytest.approx(rewards, abs=TOLERANCE)
    assert got["masks"] == expected.mask.tolist()

    # Under mask 0 any integer is padding.
    body = {"prompts": ["Count."], "return_tokens": True}
    body |= {"response_ids": [[*ids, -100]], "response_masks": [[*mask, 0]]}
    got = ask(embedded, generator, "/v1/score", body).json()
    assert got["token_rewards"][0] == pytest.approx([*rewards, 0], abs=TOLERANCE)
    assert got["tokens"][0][-1] == ""


def test_the_configuration_is_the_servers(generator: Any) -> None:
    options = {"config": CMEConfig(level="sequence", baseline="policy")}
    body = {"prompts": ["a"], "response_ids": [[5, 6]], "policy_logprobs": [[-1, -2.5]]}
    got = ask(table(), generator, "/v1/score", body, **options).json()
    assert got["level"] == "sequence"
    expected = CrossModelEntropy(table(), generator, CMEConfig(baseline="policy"))
    reward = float(expected(["a"], [[5, 6]], None, [[-1, -2.5]]).sequence_rewards[0])
    assert got["sequence_rewards"] == [pytest.approx(reward, abs=TOLERANCE)]
    got = ask(table(), generator, "/v1/score", body | {"level": "token"}, **options).json()
    rewards = expected(["a"], [[5, 6]], None, [[-1, -2.5]]).token_rewards[0].tolist()
    assert got["token_rewards"] == [pytest.approx(rewards, abs=TOLERANCE)]
    got = ask(table(), generator, "/v1/score", IDS, **options)
    refused(got, 422, "InputError", "needs policy_logprobs")


def test_tool_calls_reach_the_verifiers_template(generator: Any) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
        "{% endfor %}<|im_start|>"
    )
    verifier = TableVerifier(load_tokenizer("byte-level"))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [[{"role": "user", "content": parts}, call]], "response_ids": [[5]]}
    got = ask(verifier, generator, "/v1/score", body, config=CMEConfig(chat_template=template))
    assert got.status_code == 200
    assert verifier.tokenizer.decode(verifier.prompts[0]) == (
        '<|im_start|>user ab<|im_end|><|im_start|>assistant {"name": "f", "arguments": {}}'
        "<|im_end|><|im_start|>assistant"
    )
    got = ask(table("byte-level"), generator, "/v1/score", body)
    refused(got, 422, "InputError", r"leaves out tool calls of message 1 \(role 'assistant'\)")


def test_nothing_to_score(generator: Any) -> None:
    got = ask(table(), generator, "/v1/score", {"prompts": [], "response_ids": []})
    assert got.status_code == 200
    assert got.json()["sequence_rewards"] == got.json()["token_rewards"] == []


def test_an_ensemble_is_served(generator: Any) -> None:
    members = [table("sentencepiece"), table("byte-level-nfc")]
    expected = CrossModelEntropy(Ensemble(members), generator)(["a"], [[5, 6, 7]])
    body = {"prompts": ["a"], "response_ids": [[5, 6, 7]]}
    got = ask(Ensemble(members), generator, "/v1/score", body).json()
    rewards = expected.token_rewards[0].tolist()
    assert got["token_rewards"][0] == pytest.approx(rewards, abs=TOLERANCE)


def test_waiting_requests_are_scored_in_one_call_rollouts_of_a_prompt_together(
    generator: Any,
) -> None:
    verifier = Gated(load_tokenizer("sentencepiece"))

    async def test() -> None:
        async with serving(verifier, generator) as client:

            def post(prompt: str, k: int) -> Any:
                body = {"prompts": [prompt], "response_ids": [[5 + k]]}
                return asyncio.ensure_future(client.post("/v1/score", json=body))

            replies = [post("first", 0)]
            await asyncio.to_thread(verifier.busy.wait, PATIENCE)
            replies += [post(["one", "two", "three"][k % 3], k) for k in range(12)]
            waiting = client.app.state.verifier
            await asyncio.to_thread(until, lambda: waiting.waiting == 12)
            verifier.gate.set()
            assert [reply.status_code for reply in await asyncio.gather(*replies)] == [200] * 13

    run(test)
    assert [len(prompts) for prompts, _ in verifier.calls] == [1, 12]
    # The oldest prompt's rollouts stand together; equal prompts are found among the others.
    prompts = verifier.calls[1][0]
    assert prompts[:4] == [prompts[0]] * 4
    assert prompts[4:].count(prompts[0]) == 0


def test_only_a_verifier_on_the_cpu_lingers_unless_told_otherwise(
    embedded: Any, generator: Any
) -> None:
    def linger(verifier: Any, **options: Any) -> float:
        return create_app(verifier, generator, **options).state.verifier.linger_seconds

    assert embedded.device.type == "cpu"
    assert linger(embedded) == 0.25
    assert linger(embedded, linger_seconds=0) == 0
    elsewhere = table()  # a verifier without a device, such as one behind HTTP
    assert linger(elsewhere) == 0
    assert linger(elsewhere, linger_seconds=0.5) == 0.5


def test_only_the_request_at_fault_fails(generator: Any) -> None:
    """Twelve requests in one call of the verifier, which fails because of one."""
    tokenizer = load_tokenizer("sentencepiece")
    bad = CrossModelEntropy(table(), generator).table.encode("Z")[0].tolist()
    verifier = Gated(tokenizer, dislikes=int(tokenizer.encode("Z", add_special_tokens=False)[-1]))

    async def test() -> list[Any]:
        async with serving(verifier, generator) as client:

            def post(ids: list[int]) -> Any:
                body = {"prompts": ["a"], "response_ids": [ids]}
                return asyncio.ensure_future(client.post("/v1/score", json=body))

            replies = [post([5])]
            await asyncio.to_thread(verifier.busy.wait, PATIENCE)
            replies += [post(bad if k == 7 else [5 + k]) for k in range(12)]
            await asyncio.to_thread(until, lambda: client.app.state.verifier.waiting == 12)
            verifier.gate.set()
            return await asyncio.gather(*replies)

    replies = run(test)
    assert len(verifier.calls[1][0]) == 12
    refused(replies.pop(8), 500, "VerifierError", f"does not like {verifier.dislikes}")
    for k, reply in enumerate(replies[1:]):
        ids = [5 + k + (k >= 7)]
        expected = CrossModelEntropy(table(), generator)(["a"], [ids])
        assert reply.status_code == 200
        assert reply.json()["sequence_rewards"] == expected.sequence_rewards.tolist()


def test_an_error_that_nobody_foresaw_shows_nothing_of_the_inside(
    generator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(TableVerifier):
        def logprobs(self, prompts: Any, responses: Any) -> Any:
            raise KeyError("a secret of the implementation")

    got = ask(Broken(load_tokenizer("sentencepiece")), generator, "/v1/score", IDS)
    refused(got, 500, "KeyError", "an error in the server; see its log")


@pytest.mark.parametrize("end", [SystemExit(1), asyncio.CancelledError(), StopIteration()])
def test_a_call_that_ends_in_anything_is_an_answer(generator: Any, end: BaseException) -> None:
    """To all who wait for it; raised as it is, it would end the server, or the wrong task."""

    class Ending(TableVerifier):
        def logprobs(self, prompts: Any, responses: Any) -> Any:
            if any(len(response) > 3 for response in responses):
                raise end
            return super().logprobs(prompts, responses)

    async def test() -> list[Any]:
        async with serving(Ending(load_tokenizer("sentencepiece")), generator) as client:

            def post(n: int) -> Any:
                return client.post("/v1/score", json={"prompts": ["a"], "responses": ["b " * n]})

            replies = await asyncio.gather(*(post(n) for n in (1, 9, 9, 1)))
            return [*replies, await post(1)]

    first, *guilty, second, later = run(test)
    for reply in guilty:
        refused(reply, 500, "VerifierError", re.escape(f"the call ended in {end!r}"))
    assert [reply.status_code for reply in (first, second, later)] == [200, 200, 200]


def test_health_metrics_and_documents(generator: Any) -> None:
    async def test() -> None:
        async with serving(table(), generator) as client:
            health = await client.get("/health")
            assert health.status_code == 200
            assert health.json()["status"] == "ok"
            assert health.json()["verifier"] == "table"
            assert health.json()["max_length"] == 10_000
            await client.post("/v1/score", json=IDS)
            await client.post("/v1/score", json={})
            await client.get("/no/such/path")
            got = await client.get("/metrics")
            assert got.headers["content-type"].startswith("text/plain")
            for line in (
                'cme_requests_total{path="/v1/score",status="200"} 1.0',
                'cme_requests_total{path="/v1/score",status="422"} 1.0',
                'cme_requests_total{path="other",status="404"} 1.0',
                "cme_responses_total 1.0",
                "cme_requests_held 0.0",
                "cme_bytes_held 0.0",
                "cme_verifier_call_responses_count 1.0",
                f'cme_server_info{{verifier="table",version="{__version__}"}} 1.0',
            ):
                assert line in got.text.splitlines(), got.text
            document = (await client.get("/openapi.json")).json()
            assert {"/v1/score", "/get_reward", "/health", "/metrics"} == document["paths"].keys()
            for status in ("200", "400", "401", "408", "413", "415", "422", "429", "500", "503"):
                assert status in document["paths"]["/v1/score"]["post"]["responses"]
            assert (await client.get("/docs")).status_code == 200

    run(test)


def test_the_example_in_the_document_can_be_scored(generator: Any) -> None:
    async def test() -> None:
        async with serving(table(), generator) as client:
            models = (await client.get("/openapi.json")).json()["components"]["schemas"]
            for path, name in (("/v1/score", "ScoreRequest"), ("/get_reward", "RewardRequest")):
                for example in models[name]["examples"]:
                    got = await client.post(path, json=example)
                    assert got.status_code == 200, got.text

    run(test)
