"""A real vLLM server gives the same rewards as the same model in this process.

Not collected by `pytest`: vLLM needs an environment of its own, which `nox -s vllm` makes before it
runs this file. The server runs on the CPU, in float32, with one model at a time: two small ones,
and SmolLM2-135M-Instruct where `python -m benchmarks.real.models` has fetched it.
"""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import real_pair
import torch
from transformers import AutoTokenizer
from vllm_server import BACKEND, KEY, MODELS, START_SECONDS, Server, forget_peak, peak

from cme_reward import CMEBatch, CMEConfig, CrossModelEntropy, VerifierError, load_verifier

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # nats a token


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("vllm")
    name, _, runner = request.param.partition("-")
    MODELS[name](base / name)
    running = Server(base / name, [], {})
    if runner == "generate":
        for file, text in BACKEND.items():
            (base / "triton" / file).parent.mkdir(parents=True, exist_ok=True)
            (base / "triton" / file).write_text(text, encoding="utf-8")
        running.path = "/inference/v1/generate"
        running.options = ["--enable-scale-out", "--enforce-eager"]
        running.environment = {
            "PYTHONPATH": str(base / "triton"),
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
        }
    try:
        running.start()
        yield running
    finally:
        running.stop()


GENERATE = ["llama-generate", "gemma3-generate"]
REAL = pytest.param(
    "smollm2",
    marks=pytest.mark.skipif(not real_pair.VERIFIER.is_dir(), reason=real_pair.NEEDED),
)
on = pytest.mark.parametrize("server", ["llama", "gemma3", *GENERATE], indirect=True)
on_all = pytest.mark.parametrize("server", ["llama", "gemma3", *GENERATE, REAL], indirect=True)
on_compiled = pytest.mark.parametrize("server", ["llama", "gemma3", REAL], indirect=True)
on_generate = pytest.mark.parametrize("server", GENERATE, indirect=True)
on_llama = pytest.mark.parametrize("server", ["llama"], indirect=True)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CME_API_KEY", KEY)


@cache
def generator() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "generator")


@cache
def rollouts() -> tuple[list[str], list[list[int]]]:
    """64 responses: to each of 8 problems, its own answers and those to the next, 8 in all."""
    with (ROOT / "examples" / "gsm8k.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    problems = [row["prompt"] for row in rows]
    prompts, responses = [], []
    for prompt in list(dict.fromkeys(problems))[:8]:
        at = problems.index(prompt)
        for row in [*rows, *rows][at : at + 8]:
            prompts.append(prompt)
            responses.append(generator()(row["response"], add_special_tokens=False)["input_ids"])
    assert len(set(prompts)) == 8
    assert len(responses) == 64
    return prompts, responses


Connect: TypeAlias = Callable[..., Any]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes verifiers that are closed at the end."""
    made: list[Any] = []

    def make(server: Server, **options: Any) -> Any:
        options = {"tokenizer": str(server.folder)} | options
        made.append(load_verifier(f"vllm:{server.url}", **options))
        return made[-1]

    yield make
    for verifier in made:
        verifier.close()


def in_process(server: Server) -> Any:
    return load_verifier(f"hf:{server.folder}", dtype="float32")


def score(verifier: Any, n: int = 64) -> CMEBatch:
    prompts, responses = rollouts()
    return CrossModelEntropy(verifier, generator(), CMEConfig())(prompts[:n], responses[:n])


def size(server: Server) -> int:
    """Responses to score: what takes seconds."""
    return 16 if is_real(server) else 64


def is_real(server: Server) -> bool:
    return server.folder.name == "smollm2"


@on_all
def test_gives_the_rewards_of_the_model_in_process(
    server: Server, connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    got = score(connect(server), size(server))
    wanted = score(in_process(server), size(server))

    assert got.mask.tolist() == wanted.mask.tolist()
    assert got.token_logprobs[got.mask].isfinite().all()
    distance = (got.token_logprobs - wanted.token_logprobs).abs().max().item()
    verifier_tokens = [
        np.abs(own[1] - other[1]).max()
        for own, other in zip(got.verifier_tokens, wanted.verifier_tokens, strict=True)
    ]
    sequences = (got.sequence_rewards - wanted.sequence_rewards).abs().max().item()
    with capsys.disabled():
        print(
            f"\n{server.folder.name}: largest difference of {int(got.mask.sum())} tokens "
            f"{distance:.1e} nats, of {sum(len(ids) for ids, _ in got.verifier_tokens)} verifier "
            f"tokens {max(verifier_tokens):.1e}, of {len(got.sequence_rewards)} sequence rewards "
            f"{sequences:.1e}; mean log-prob {wanted.token_logprobs[wanted.mask].mean():.2f}; "
            f"{server.answers()} answers from {server.path}"
        )
    # The generator's add up several of the verifier's: with SmolLM2 1.6e-4 was measured.
    assert distance < TOLERANCE * (2 if is_real(server) else 1)
    assert max(verifier_tokens) < TOLERANCE
    assert sequences < TOLERANCE


@on
def test_asks_in_the_quickest_way_the_server_has(server: Server, connect: Connect) -> None:
    verifier = connect(server)
    before = server.answers()
    verifier.logprobs([[0, 7, 8]] * 3, [[20, n] for n in (21, 22, 23)])
    assert server.answers() == before + 3


@on
def test_fills_the_context_to_the_last_token(server: Server, connect: Connect) -> None:
    own = in_process(server)
    verifier = connect(server)
    assert verifier.max_length == own.max_length - 1  # vLLM insists on generating one token
    text = np.random.default_rng(0).integers(20, 2048, verifier.max_length).tolist()
    for split in (1, 700, len(text) - 1):
        asked = [text[:split]], [text[split:]]
        got, wanted = verifier.logprobs(*asked)[0], own.logprobs(*asked)[0]
        assert got.shape == wanted.shape == (len(text) - split,)
        assert np.abs(got - wanted).max() < TOLERANCE


@on
def test_gives_the_same_when_asked_again(server: Server, connect: Connect) -> None:
    """What the server has in its cache by now must not matter."""
    verifier = connect(server)
    prompt = list(range(20, 320))
    responses = [list(range(a, a + 200)) for a in (400, 600, 800, 400)]
    first = verifier.logprobs([prompt] * 4, responses)
    again = verifier.logprobs([prompt] * 4, responses)
    for own, other in zip(first, again, strict=True):
        assert np.abs(own - other).max() < TOLERANCE
    assert np.abs(first[0] - first[3]).max() < TOLERANCE


@on_generate
def test_a_prompt_is_computed_once(server: Server, connect: Connect) -> None:
    verifier = connect(server)
    prompts = [list(range(1000, 1400))] * 4
    responses = [list(range(a, a + 50)) for a in (100, 200, 300, 500)]
    before = server.tokens_from_cache()
    got = verifier.logprobs(prompts, responses)
    blocks = (len(prompts[0]) - 1) // 128 * 128  # only whole ones can be shared
    assert server.tokens_from_cache() - before == 3 * blocks
    for row, wanted in zip(got, in_process(server).logprobs(prompts, responses), strict=True):
        assert np.abs(row - wanted).max() < TOLERANCE


@on_llama
def test_refuses_what_cannot_be_right(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VerifierError, match=r"give the tokenizer of the model"):
        connect(server, tokenizer=generator())
    with pytest.raises(VerifierError, match=r"serves 'llama', not 'gemma'"):
        connect(server, model="gemma")
    verifier = connect(server)
    with pytest.raises(VerifierError, match=r"(?s)response 1: .*vocab.*tokenizer=") as caught:
        verifier.logprobs([[0], [0]], [[20], [2048]])
    assert KEY not in str(caught.value)
    with pytest.raises(VerifierError, match=r"max_length"):
        verifier.logprobs([[0]], [[20] * 2047])
    monkeypatch.setenv("CME_API_KEY", "a wrong key")
    with pytest.raises(VerifierError, match=r"(?s)401.*CME_API_KEY") as caught:
        connect(server)
    assert "a wrong key" not in str(caught.value)


@on_compiled
def test_throughput_beside_in_process(
    server: Server, connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measurement; nothing to hold it to, since most of it is the engine's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # vLLM keeps one of two cores for what is not the model
    verifiers = {
        "vLLM, over HTTP": connect(server),
        "in process": in_process(server),
    }
    wall: dict[str, list[float]] = {name: [] for name in verifiers}
    cpu: dict[str, list[float]] = {name: [] for name in verifiers}
    extra: dict[str, list[float]] = {name: [] for name in verifiers}
    n_tokens = 0
    for _ in range(4):
        for name, verifier in verifiers.items():
            processes = [Path("/proc/self")]
            if name != "in process":
                processes += server.processes()
            resident = forget_peak(processes)
            before = time.process_time() + server.cpu_seconds()
            batch = score(verifier, size(server))
            wall[name].append(batch.metrics["verifier_seconds"])
            cpu[name].append(time.process_time() + server.cpu_seconds() - before)
            extra[name].append(peak(processes) - resident)
            n_tokens = sum(len(ids) for ids, _ in batch.verifier_tokens)
    torch.set_num_threads(threads)
    with capsys.disabled():
        print(
            f"\n{server.folder.name}: {n_tokens} verifier tokens in {size(server)} responses, "
            "eight to a prompt"
        )
        for name in verifiers:
            seconds = statistics.median(wall[name][1:])
            print(
                f"  {name:16} {n_tokens / seconds:8,.0f} tokens/s ({seconds:.2f} s, "
                f"median of 3), {statistics.median(cpu[name][1:]):.2f} CPU s, "
                f"+{max(extra[name]):.0f} MB, client included"
            )


@on_llama
def test_loses_nothing_when_the_server_dies_and_returns(server: Server, connect: Connect) -> None:
    own = in_process(server)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(20, 2048, 200).tolist() for _ in range(100)]
    responses = [rng.integers(20, 2048, n).tolist() for n in rng.integers(1, 400, 100)]
    verifier = connect(server)
    before = server.answers()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(verifier.logprobs, prompts, responses)
        while server.answers() < before + 10 and not pending.done():
            time.sleep(0.01)
        server.stop(signal.SIGKILL)
        assert not pending.done()
        server.start()
        got = pending.result(START_SECONDS)
    for row, wanted in zip(got, own.logprobs(prompts, responses), strict=True):
        assert np.abs(row - wanted).max() < TOLERANCE
