"""What a server's reply costs the client: from a request's JSON out to log-probs in.

Replies have the form of those recorded from vLLM 0.32 (`tests/verifiers/recordings`) and of
SGLang's source, for a prompt of 200 tokens and a response of 512. Bytes need no clock.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cme_reward.verifiers import sglang, vllm, vllm_generate

RECORDED = Path(__file__).parents[1] / "tests" / "verifiers" / "recordings" / "vllm"
RNG = np.random.default_rng(0)
PROMPT, RESPONSE = (RNG.integers(1000, 150_000, n).tolist() for n in (200, 512))
LOGPROBS = -RNG.exponential(2.0, len(PROMPT) + len(RESPONSE)).astype(np.float32)
"""Of each token; the first has none."""


def recorded(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())["reply"]


def completions() -> Any:
    reply = recorded("completions")
    ids = [*PROMPT, *RESPONSE]
    entries = [
        {str(i): {"logprob": float(x), "rank": i % 997, "decoded_token": " word"}}
        for i, x in zip(ids, LOGPROBS, strict=True)
    ]
    (known,) = reply["choices"][0]["prompt_logprobs"][1].values()
    assert known.keys() == entries[1][str(ids[1])].keys()
    reply["choices"][0]["prompt_logprobs"] = [None, *entries[1:]]
    return reply


def generate() -> Any:
    reply = recorded("generate")
    assert {"prompt_token_ids", "prompt_token_id_logprobs"} <= reply.keys()
    binary = io.BytesIO()
    np.save(binary, LOGPROBS[len(PROMPT) :, None])
    encoded = base64.b64encode(binary.getvalue()).decode()
    return reply | {
        "prompt_token_id_logprobs": encoded,
        "prompt_token_ids": [*PROMPT, *RESPONSE],
    }


def of_sglang(text: str | None) -> Any:
    scored = zip(LOGPROBS[len(PROMPT) :].tolist(), RESPONSE, strict=True)
    entries = [[None, PROMPT[-1], text], *([x, i, text] for x, i in scored)]
    return {"text": "", "meta_info": {"input_token_logprobs": entries}}


def client(dialect: ModuleType, reply: Any, **options: Any) -> tuple[int, int, Callable[[], Any]]:
    """Bytes sent and received, and what the client computes for one response."""
    wire = json.dumps(reply, separators=(",", ":")).encode()

    def sent() -> bytes:
        _, body = dialect.request("model", PROMPT, RESPONSE, **options)
        return json.dumps(body, separators=(",", ":")).encode()

    def work() -> np.ndarray:
        sent()
        return dialect.logprobs(json.loads(wire), PROMPT, RESPONSE)

    np.testing.assert_array_equal(work(), LOGPROBS[len(PROMPT) :])
    return len(sent()), len(wire), work


@pytest.mark.parametrize(
    ("what", "ours", "baseline"),
    [
        (
            "vLLM: /inference/v1/generate against /v1/completions",
            lambda: client(vllm_generate, generate()),
            lambda: client(vllm, completions()),
        ),
        (
            "SGLang: without texts against with them",
            lambda: client(sglang, of_sglang(None)),
            lambda: client(sglang, of_sglang(" word"), texts=True),
        ),
    ],
)
def test_a_response(
    what: str, ours: Callable[[], Any], baseline: Callable[[], Any], paired: Any, ratio_table: Any
) -> None:
    out, back, quick = ours()
    plain_out, plain_back, plain = baseline()
    assert out + back < plain_out + plain_back
    timing = paired(quick, plain, rounds=200, warmup=5)
    if timing:
        ratio_table(
            "a server's reply",
            what,
            f"{timing.ours * 1e3:.2f} ms; {out:,} bytes out, {back:,} in",
            f"{timing.baseline * 1e3:.2f} ms; {plain_out:,}, {plain_back:,}",
            f"{timing.ratio:.3f}",
        )
