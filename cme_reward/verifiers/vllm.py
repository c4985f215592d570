"""What vLLM is asked and answers: prompt log-probs of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cme_reward.errors import VerifierError
from cme_reward.verifiers.dialect import finite

SHARES_PROMPTS = False  # vLLM does not read its prefix cache where prompt log-probs are asked for
MINUS_INFINITY = -9999.0  # as vLLM writes it in JSON
KEY_VARIABLES = ("CME_API_KEY", "VLLM_API_KEY")


def request(
    model: str, prompt: Sequence[int], response: Sequence[int], *, texts: bool = False
) -> tuple[str, Any]:
    """Path and body that score `response`. The texts of its ids come in any case."""
    return "/v1/completions", {
        "model": model,
        "prompt": [*prompt, *response],
        "max_tokens": 1,  # 0 is refused
        "temperature": 1.0,
        "prompt_logprobs": 0,  # the prompt's own tokens alone
    }


def logprobs(reply: Any, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """Log-probs of the response's ids, each looked up by the id that was sent."""
    entries = _entries(reply, prompt, response)
    values = np.empty(len(response), np.float32)
    for s, (entry, i) in enumerate(zip(entries, response, strict=True)):
        found = entry.get(str(i)) if isinstance(entry, dict) else None
        if not isinstance(found, dict) or not isinstance(found.get("logprob"), int | float):
            raise VerifierError(
                f"no log-prob of token {s}, id {i}, but {str(entry)[:200]}: the server scored "
                "another text than it was sent, or a proxy changed the reply"
            )
        values[s] = found["logprob"]
    values[values <= MINUS_INFINITY] = -np.inf
    return finite(values, response)


def texts(reply: Any, prompt: Sequence[int], response: Sequence[int]) -> list[str | None]:
    """What the server's own tokenizer writes for each id; None where it does not say."""
    entries = _entries(reply, prompt, response)
    return [
        entry.get(str(i), {}).get("decoded_token")
        for entry, i in zip(entries, response, strict=True)
    ]


def _entries(reply: Any, prompt: Sequence[int], response: Sequence[int]) -> list[Any]:
    try:
        entries = reply["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    expected = len(prompt) + len(response)
    if not isinstance(entries, list) or len(entries) != expected:
        got = f"{len(entries)} of them" if isinstance(entries, list) else str(reply)[:200]
        raise VerifierError(
            f"expected choices[0].prompt_logprobs for {expected} tokens, got {got}: is this a vLLM "
            "server? (an SGLang server is sglang:URL)"
        )
    return entries[len(prompt) :]
