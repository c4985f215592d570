"""Access, limits, slow and vanished clients of the reward server, in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from server_tools import GOOD, IDS, Gated, refused, run, serving
from stubs import TableVerifier
from tokenizer_kinds import load_tokenizer
from waiting import PATIENCE, until

from cme_reward import ConfigError
from cme_reward.server import ServerSettings, create_app
from cme_reward.server.settings import check_host
from cme_reward.verifiers.base import Closes

TOKEN = "correct-horse-battery-staple"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def generator() -> Any:
    return load_tokenizer("byte-level")


def table() -> TableVerifier:
    return TableVerifier(load_tokenizer("sentencepiece"))


async def idle(client: Any) -> None:
    """Until nothing is held any more."""
    gate = client.app.state.gate
    await asyncio.to_thread(until, lambda: (gate.requests, gate.bytes) == (0, 0))


def test_more_requests_than_can_be_held_are_sent_away_with_a_time_to_come_back(
    generator: Any,
) -> None:
    verifier = Gated(load_tokenizer("sentencepiece"))

    async def test() -> None:
        settings = ServerSettings(max_requests=3)
        async with serving(verifier, generator, settings=settings) as client:
            held = [asyncio.ensure_future(client.post("/v1/score", json=IDS)) for _ in range(3)]
            await asyncio.to_thread(until, lambda: client.app.state.gate.requests == 3)
            for _ in range(5):
                got = await client.post("/v1/score", json=IDS)
                refused(got, 429, "TooManyRequests", "busy with 3 requests; try again in 1 s")
                assert got.headers["retry-after"] == "1"
            assert (await client.get("/health")).status_code == 200  # is alive, and says so
            verifier.gate.set()
            assert [reply.status_code for reply in await asyncio.gather(*held)] == [200] * 3
            assert (await client.post("/v1/score", json=IDS)).status_code == 200
            await idle(client)
            metrics = (await client.get("/metrics")).text
            assert 'cme_requests_total{path="/v1/score",status="429"} 5.0' in metrics

    run(test)


def test_the_bytes_of_waiting_requests_are_bounded(generator: Any) -> None:
    verifier = Gated(load_tokenizer("sentencepiece"))
    body = json.dumps(GOOD | {"responses": ["b" * 600]})

    async def pieces() -> Any:  # of a length that is not announced
        for k in range(0, len(body), 100):
            yield body[k : k + 100].encode()

    async def test() -> None:
        settings = ServerSettings(max_body_bytes=1000, max_held_bytes=1000)
        async with serving(verifier, generator, settings=settings) as client:
            held = asyncio.ensure_future(client.post("/v1/score", content=body, headers=JSON))
            await asyncio.to_thread(verifier.busy.wait, PATIENCE)
            for content in (body, pieces()):
                got = await client.post("/v1/score", content=content, headers=JSON)
                refused(got, 429, "TooManyRequests", r"busy with [\d,]+ bytes of requests")
            verifier.gate.set()
            assert (await held).status_code == 200
            await idle(client)

    run(test)


def test_bodies_that_are_too_long_are_refused(generator: Any) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    async def test() -> None:
        settings = ServerSettings(max_body_bytes=1000)
        async with serving(table(), generator, settings=settings) as client:
            for content in (b" " * 1001, pieces()):
                got = await client.post("/v1/score", content=content, headers=JSON)
                refused(
                    got, 413, "ContentTooLarge", "longer than 1,000 bytes; send fewer responses"
                )
            padded = json.dumps(IDS).encode().ljust(1000)
            got = await client.post("/v1/score", content=padded, headers=JSON)
            assert got.status_code == 200
            await idle(client)

    run(test)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "the content type is ''"),
        ({"content-type": "text/plain"}, "'text/plain'; expected application/json"),
        ({"content-type": "application/x-www-form-urlencoded"}, "expected application/json"),
        (JSON | {"content-encoding": "gzip"}, "compressed bodies are not read"),
    ],
)
def test_other_kinds_of_content_are_refused(
    generator: Any, headers: dict[str, str], message: str
) -> None:
    async def test() -> None:
        async with serving(table(), generator) as client:
            for path in ("/v1/score", "/get_reward"):
                got = await client.post(path, content=json.dumps(GOOD), headers=headers)
                refused(got, 415, "UnsupportedMediaType", message)

    run(test)


def test_a_token_is_asked_for_and_never_logged(
    generator: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    settings = ServerSettings(token=TOKEN)
    assert TOKEN not in repr(settings)
    basic = base64.b64encode(f"cme:{TOKEN}".encode()).decode()

    async def test() -> None:
        async with serving(table(), generator, settings=settings) as client:
            for wrong in ("", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", "Basic !", TOKEN):
                headers = {"authorization": wrong} if wrong else {}
                for method, path in (
                    ("POST", "/v1/score"),
                    ("POST", "/get_reward"),
                    ("GET", "/metrics"),
                    ("GET", "/no/such/path"),
                ):
                    got = await client.request(method, path, json=IDS, headers=headers)
                    refused(got, 401, "Unauthorized", "wants a token; send it as `Authorization")
                    assert got.headers["www-authenticate"] == "Bearer"
            for right in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {basic}"):
                headers = {"authorization": right}
                got = await client.post("/v1/score", json=IDS, headers=headers)
                assert got.status_code == 200
                assert (await client.get("/metrics", headers=headers)).status_code == 200
            for path in ("/health", "/openapi.json", "/docs"):
                assert (await client.get(path)).status_code == 200
            got = await client.post("/v1/score", json=IDS, auth=("cme", TOKEN))
            assert got.status_code == 200

    run(test)
    assert TOKEN not in caplog.text


def test_a_draining_server_says_so(generator: Any) -> None:
    async def test() -> None:
        async with serving(table(), generator) as client:
            client.app.state.gate.draining = True
            got = await client.post("/v1/score", json=IDS)
            refused(got, 503, "ShuttingDown", "send the request to another one")
            assert got.headers["connection"] == "close"
            assert got.headers["retry-after"] == "1"
            health = await client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "draining")

    run(test)


Message = dict[str, Any]


async def exchange(
    app: Any,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]] | None = None,
) -> list[Message]:
    """One request below the level of an HTTP client; what the application sent."""
    sent: list[Message] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/score",
        "raw_path": b"/v1/score",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "server": ("server", 80),
        "client": ("client", 1),
    }
    await app(scope, receive, send or keep)
    return sent


def test_a_client_that_leaves_is_not_scored(generator: Any) -> None:
    verifier = Gated(load_tokenizer("sentencepiece"))
    leave = asyncio.Event()
    body = json.dumps({"prompts": ["a"], "response_ids": [[7, 7, 7]]}).encode()
    messages: list[Message] = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def test() -> None:
        async with serving(verifier, generator) as client:
            first = asyncio.ensure_future(client.post("/v1/score", json=IDS))
            await asyncio.to_thread(verifier.busy.wait, PATIENCE)
            second = asyncio.ensure_future(exchange(client.app, receive))
            await asyncio.to_thread(until, lambda: client.app.state.verifier.waiting == 1)
            assert client.app.state.gate.requests == 2
            leave.set()
            assert await second == []
            assert client.app.state.gate.requests == 1
            assert client.app.state.verifier.waiting == 0  # holds on to nothing of it
            verifier.gate.set()
            assert (await first).status_code == 200
            await idle(client)
            assert 'status="499"} 1.0' in (await client.get("/metrics")).text

    run(test)
    assert [len(prompts) for prompts, _ in verifier.calls] == [1]  # the other was never asked for


def test_a_client_that_leaves_in_the_middle_of_its_body(generator: Any) -> None:
    messages: list[Message] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b'{"prompts', "more_body": True},
    ]

    async def receive() -> Message:
        return messages.pop()

    async def test() -> None:
        async with serving(table(), generator) as client:
            assert await exchange(client.app, receive) == []
            await idle(client)

    run(test)


def test_a_body_that_comes_too_slowly(generator: Any) -> None:
    """Byte by byte it never ends: the time is that of the whole body."""

    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def test() -> None:
        settings = ServerSettings(client_seconds=0.2, max_body_bytes=200_000)
        async with serving(table(), generator, settings=settings) as client:
            start, body = await exchange(client.app, receive)
            assert start["status"] == 408
            assert (b"connection", b"close") in start["headers"]
            assert b"did not come within 0.2 s" in body["body"]
            await idle(client)

    run(test)


def test_a_client_that_does_not_read_is_given_up(generator: Any) -> None:
    body = json.dumps({"prompts": ["a"], "responses": ["b" * 50_000]}).encode()
    messages: list[Message] = [{"type": "http.request", "body": body}]
    sizes: list[int] = []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sizes.append(len(message.get("body", b"")))
        if len(sizes) == 3:  # the buffers are full
            await asyncio.Event().wait()

    async def test() -> None:
        settings = ServerSettings(client_seconds=0.2)
        async with serving(table(), generator, settings=settings) as client:
            await exchange(client.app, receive, send)
            await idle(client)

    run(test)
    assert len(sizes) == 3
    assert sizes[1:] == [64 * 1024] * 2  # never more at a time


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_loopback_needs_no_token(host: str) -> None:
    check_host(host, None, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_other_addresses_need_a_token_or_to_be_asked_for(host: str) -> None:
    with pytest.raises(ConfigError, match=r"whoever reaches.* Set CME_SERVER_TOKEN .*--allow-anon"):
        check_host(host, None, False)
    check_host(host, "token", False)
    check_host(host, None, True)


def test_a_host_that_is_none() -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        check_host("no such host", None, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": 0}, "max_requests=0: expected more than 0"),
        ({"max_body_bytes": 10, "max_held_bytes": 9}, "no request of that size would ever be"),
        ({"drain_seconds": -1.0}, "expected 0 or more"),
        ({"token": ""}, "is set and empty"),
        ({"token": "two words"}, "holds a space"),
        ({"token": "schlüssel"}, "printable ASCII"),
    ],
)
def test_settings_that_cannot_hold(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**options)


def test_the_verifier_is_closed_with_the_application(generator: Any) -> None:
    closed: list[bool] = []

    class Closing(TableVerifier, Closes):
        def close(self) -> None:
            closed.append(True)

    app = create_app(Closing(load_tokenizer("sentencepiece")), generator)

    async def test() -> None:
        async with app.router.lifespan_context(app):
            assert not closed

    run(test)
    assert closed == [True]
