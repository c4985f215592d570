"""`cme-reward serve` as a program, over a real socket, with clients of every kind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server_tools import GOOD, Program, refused
from tokenizer_kinds import TEXTS
from transformers import AutoTokenizer
from transformers.utils import logging
from typer.testing import CliRunner
from waiting import PATIENCE, until

from cme_reward import CrossModelEntropy, load_verifier
from cme_reward.cli.app import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "examples" / "generator"
MODELS = ("--verifier", "embedded", "--generator-tokenizer", str(GENERATOR), "--device", "cpu")
TOKEN = "correct-horse-battery-staple"
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    program = Program(
        *MODELS,
        "--client-seconds",
        "1",
        cwd=tmp_path_factory.mktemp("server"),
        CME_SERVER_TOKEN=TOKEN,
    )
    program.headers = {"authorization": f"Bearer {TOKEN}"}
    yield program
    log = "".join(program.log)
    assert program.stop() == 0, log
    assert "Traceback" not in log
    assert TOKEN not in log


@pytest.fixture
def client(server: Program) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def scorer() -> CrossModelEntropy:
    return CrossModelEntropy(
        load_verifier("embedded", device="cpu"), AutoTokenizer.from_pretrained(GENERATOR)
    )


def rollouts(scorer: CrossModelEntropy, words: int = 0) -> list[list[int]]:
    texts = [text for text in TEXTS if text.strip()][:8]
    if words:
        texts = [" ".join([text] * words) for text in texts]
    return [row.tolist() for row in scorer.table.encode_batch(texts).ids]


@pytest.fixture
def as_many_threads() -> Iterator[None]:
    """As the server has: their number changes how float32 rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_many_threads")
def test_rewards_over_http_equal_those_in_process(
    client: httpx.Client, scorer: CrossModelEntropy
) -> None:
    ids = rollouts(scorer)
    expected = scorer(["Say something."] * len(ids), ids)
    got = client.post("/v1/score", json={"prompts": ["Say something."], "response_ids": ids})
    assert got.status_code == 200
    rewards = expected.sequence_rewards.tolist()
    assert got.json()["sequence_rewards"] == pytest.approx(rewards, abs=1e-6)
    for b, row in enumerate(got.json()["token_rewards"]):
        assert row == pytest.approx(expected.token_rewards[b, : len(row)].tolist(), abs=1e-6)
        assert got.json()["masks"][b] == expected.mask[b, : len(row)].tolist()


def test_many_clients_at_a_time_get_their_own_rewards(
    server: Program, scorer: CrossModelEntropy
) -> None:
    tokenizer = scorer.generator_tokenizer
    prompt = "Say something."  # plain text, since this tokenizer has no chat template
    ids = rollouts(scorer)
    expected = scorer([prompt] * len(ids), ids).sequence_rewards.tolist()
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)

    def post(k: int) -> Any:
        query = tokenizer.decode(prompt_ids + ids[k % len(ids)], skip_special_tokens=False)
        body = {"query": [query], "prompts": [prompt], "labels": [None]}
        url = f"{server.url.replace('//', f'//cme:{TOKEN}@')}/get_reward"
        return httpx.post(url, json=body, timeout=PATIENCE)

    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(post, range(48)))
    for k, reply in enumerate(replies):
        assert reply.status_code == 200
        # Which requests are scored together changes how float32 rounds.
        assert reply.json()["rewards"] == [pytest.approx(expected[k % len(ids)], abs=1e-5)]


def test_50_mb_are_refused_and_not_kept(client: httpx.Client, server: Program) -> None:
    def memory() -> float:
        text = client.get("/metrics").text
        (line,) = (x for x in text.splitlines() if x.startswith("process_resident_memory_bytes"))
        return float(line.split()[1])

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * MIB

    before = memory()
    headers = {"content-type": "application/json"}
    for content in (b" " * (50 * MIB), pieces()):
        got = client.post("/v1/score", content=content, headers=headers)
        refused(got, 413, "ContentTooLarge", "longer than 16,777,216 bytes; send fewer responses")
    assert memory() - before < 40 * MIB
    assert client.get("/health").status_code == 200


def connected(server: Program, data: bytes, receive_buffer: int | None = None) -> socket.socket:
    raw = socket.socket()
    raw.settimeout(PATIENCE)
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(data)
    return raw


def request(body: bytes, length: int | None = None) -> bytes:
    return (
        b"POST /v1/score HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
        % (TOKEN.encode(), len(body) if length is None else length, body)
    )


def until_closed(raw: socket.socket) -> bytes:
    received = b""
    try:
        while piece := raw.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def nothing_is_held(client: httpx.Client) -> Callable[[], bool]:
    return lambda: "cme_requests_held 0.0" in client.get("/metrics").text.splitlines()


def test_clients_that_disconnect_leave_nothing_behind(
    client: httpx.Client, server: Program
) -> None:
    body = json.dumps({"prompts": ["a"], "responses": ["word " * 500]}).encode()
    for k in range(30):
        # After the headers, half of the body, all of it; with and without a reset.
        data = request(body[: [0, len(body) // 2, len(body)][k % 3]], len(body))
        with connected(server, data) as raw:
            if k % 2:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(nothing_is_held(client))
    assert client.post("/v1/score", content=body, headers={"content-type": "application/json"})


def test_clients_that_are_slow_do_not_stay(client: httpx.Client, server: Program) -> None:
    """The server's --client-seconds is 1."""
    with connected(server, b"POST /v1/score HTTP/1.1\r\nHost:") as raw:  # headers that do not end
        assert until_closed(raw) == b""
    with connected(server, b"") as raw:
        assert until_closed(raw) == b""
    with connected(server, request(b'{"prompts":', 100)) as raw:
        reply = until_closed(raw)
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not come within 1 s" in reply
    # Refused for what its headers say, and sends on, bit by bit, for nobody.
    with connected(server, request(b"", 50 * MIB)) as raw:
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                try:
                    raw.send(b" ")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        reply = until_closed(raw)
        stop.set()
        dripping.join()
        assert reply.startswith(b"HTTP/1.1 413 ")
    until(nothing_is_held(client))


def test_headers_are_not_kept_whatever_their_length(server: Program) -> None:
    """They are what no other limit counts, and a parser keeps."""
    sent = 0
    with connected(server, b"GET /health HTTP/1.1\r\nX: ") as raw:
        try:
            while sent < 256 * MIB:
                sent += raw.send(b"x" * 65536)
        except ConnectionError:
            pass
    assert sent < 64 * MIB  # what the system's buffers take, and more


def test_a_reply_that_is_not_read_is_given_up(client: httpx.Client, server: Program) -> None:
    body = json.dumps({"prompts": ["a"], "response_ids": [[70] * 700_000]}).encode()
    with connected(server, request(body), receive_buffer=4096) as raw:
        until(lambda: 'path="/v1/score",status="499"' in client.get("/metrics").text)
        until(nothing_is_held(client))
        reply = until_closed(raw)
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert b"metrics" not in reply[-1000:]  # with which it would end


def test_what_is_not_http(client: httpx.Client, server: Program) -> None:
    with connected(server, b"\x16\x03\x01 hello\r\n\r\n") as raw:
        assert until_closed(raw).startswith(b"HTTP/1.1 400 ")
    assert client.get("/health").status_code == 200


def test_no_request_that_its_own_document_describes_makes_the_server_fail(
    server: Program, client: httpx.Client, tmp_path: Path
) -> None:
    """Schemathesis: valid and invalid requests by the hundred, replies as the document says."""
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            "run",
            f"{server.url}/openapi.json",
            f"--header=Authorization: Bearer {TOKEN}",
            "--max-examples=15",
            "--continue-on-failure",
            # No schema can say that two lists must have one length.
            "--exclude-checks=positive_data_acceptance",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Selected: 4/4" in done.stdout
    metrics = client.get("/metrics").text
    for path in ("/v1/score", "/get_reward"):
        for status in (200, 422):  # it got through to the reward, and was refused
            assert f'cme_requests_total{{path="{path}",status="{status}"}}' in metrics
    assert 'status="500"' not in metrics


def unfinished(server: Program) -> tuple[socket.socket, bytes]:
    """A request that lacks its body's other half, so that no server is through before it comes."""
    body = json.dumps(GOOD).encode()
    half = len(body) // 2
    raw = connected(server, request(body[:half], len(body)))
    until(lambda: server.metric("cme_requests_held") == 1)
    return raw, body[half:]


def test_sigterm_under_load(tmp_path: Path, scorer: CrossModelEntropy) -> None:
    """What was accepted is answered, what comes then is told to go elsewhere."""
    program = Program(*MODELS, "--max-batch-tokens", "1", cwd=tmp_path)
    ids = rollouts(scorer, words=2)
    body = {"prompts": ["Say something."], "response_ids": ids, "level": "sequence"}
    expected = scorer(["Say something."] * len(ids), ids).sequence_rewards.tolist()
    n = 16

    def post(k: int) -> httpx.Response:
        return httpx.post(f"{program.url}/v1/score", json=body, timeout=PATIENCE)

    late: list[Any] = []
    tick = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=program.url, timeout=PATIENCE) as client:
            while not tick.wait(0.05):
                try:
                    late.append(client.post("/v1/score", json=GOOD))
                except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
                    return  # the port is closed

    raw, rest = unfinished(program)
    with raw, ThreadPoolExecutor(n + 2) as pool:
        replies = [pool.submit(post, k) for k in range(n)]
        until(lambda: program.metric("cme_requests_held") == 1 + n)
        program.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{program.url}/health").status_code == 503)
        asking = [pool.submit(keep_asking) for _ in range(2)]
        for reply in replies:
            got = reply.result()
            assert got.status_code == 200, got.text
            assert got.json()["sequence_rewards"] == pytest.approx(expected, abs=1e-5)
        until(lambda: len(late) > 0)
        raw.sendall(rest)
        assert until_closed(raw).startswith(b"HTTP/1.1 200 ")
        for thread in asking:
            thread.result()
    assert program.stop(None) == 0
    for got in late:
        refused(got, 503, "ShuttingDown", "send the request to another one")
        assert got.headers["connection"] == "close"
    assert "stopped, with 0 requests unanswered" in "".join(program.log)
    with pytest.raises(httpx.ConnectError):
        post(0)


def test_asked_twice_it_stops_at_once_and_says_what_is_lost(
    tmp_path: Path, scorer: CrossModelEntropy
) -> None:
    program = Program(*MODELS, "--max-batch-tokens", "1", cwd=tmp_path)
    body = {"prompts": ["a"], "response_ids": 20 * rollouts(scorer, words=2)}

    def post(k: int) -> httpx.Response:
        return httpx.post(f"{program.url}/v1/score", json=body, timeout=PATIENCE)

    raw, _ = unfinished(program)
    with raw, ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(post, k) for k in range(8)]
        until(lambda: program.metric("cme_requests_held") == 1 + 8)
        program.process.send_signal(signal.SIGINT)
        until(lambda: httpx.get(f"{program.url}/health").status_code == 503)
        assert program.stop(signal.SIGINT) == 1
        got = [r.result() for r in replies]
        reply = until_closed(raw)
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"ShuttingDown" in reply
    lost = [r for r in got if r.status_code != 200]
    log = "".join(program.log)
    for answer in lost:
        refused(answer, 503, "ShuttingDown", "send the request to another one")
    assert f"stopped, with {1 + len(lost)} requests unanswered" in log
    assert "Traceback" not in log


@pytest.fixture
def _restore_logging() -> Iterator[None]:
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def start(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["serve", *options])
    return done.exit_code, " ".join(done.stderr.split())


@pytest.mark.usefixtures("_restore_logging")
def test_what_is_not_started() -> None:
    status, says = start(*MODELS, "--host", "0.0.0.0")
    assert status == 2
    assert "Set CME_SERVER_TOKEN to a secret" in says
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, says = start(*MODELS, "--port", str(taken.getsockname()[1]))
    assert status == 2
    assert "cannot listen on 127.0.0.1" in says
    assert "choose another --port" in says
    status, says = start("--verifier", "no", "--generator-tokenizer", str(GENERATOR), "--port", "0")
    assert status == 2
    assert "unknown verifier 'no'" in says
    # Before anything loads: neither verifier nor tokenizer is there.
    nothing = ("--verifier", "no", "--generator-tokenizer", "no", "--port", "0")
    for option, value, message in (
        ("--linger", "inf", "linger_seconds=inf: expected a number of seconds, 0 or more"),
        ("--linger", "nan", "linger"),  # refused by typer, or, where that is old, by us
        ("--linger", "-1", "Invalid value for '--linger'"),
        ("--linger", "soon", "Invalid value for '--linger'"),
        ("--max-body", "inf", "--max-body inf: expected a number of MiB"),
        ("--max-body", "nan", "--max-body"),
    ):
        status, says = start(*nothing, f"{option}={value}")
        assert status == 2
        assert message in says
    status, says = start("--verifier", "embedded", "--generator-tokenizer", "no", "--port", "0")
    assert status == 2
    assert "cannot load the tokenizer 'no'" in says


@pytest.mark.usefixtures("_restore_logging")
@pytest.mark.parametrize("part", ["verifier", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    classes = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}
    config: dict[str, Any] = {"model_type": "trap", "auto_map": classes}
    if part == "tokenizer":
        config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "trap.T"]}}
    name = "config.json" if part == "verifier" else "tokenizer_config.json"
    (folder / name).write_text(json.dumps(config))
    verifier = f"hf:{folder}" if part == "verifier" else "embedded"
    tokenizer = str(GENERATOR) if part == "verifier" else str(folder)
    status, says = start("--verifier", verifier, "--generator-tokenizer", tokenizer, "--port", "0")
    assert status == 2, says
    assert not (tmp_path / "ran").exists()
