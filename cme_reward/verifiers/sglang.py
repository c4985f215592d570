"""What SGLang is asked and answers: log-probs of input ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cme_reward.errors import VerifierError
from cme_reward.verifiers.dialect import finite

SHARES_PROMPTS = True
KEY_VARIABLES = ("CME_API_KEY", "SGLANG_API_KEY")


def request(
    model: str, prompt: Sequence[int], response: Sequence[int], *, texts: bool = False
) -> tuple[str, Any]:
    """Path and body that score `response`. Only the native endpoint takes ids and a start.

    The server decodes the tokens one by one for `texts`, so that only the handshake asks for them.
    """
    return "/generate", {
        "input_ids": [*prompt, *response],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # The entry at the start is always null, so that it has to be the last prompt token.
        # What lies before may come out of the server's prefix cache.
        "logprob_start_len": len(prompt) - 1,
        "return_text_in_logprobs": texts,
    }


def logprobs(reply: Any, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """Log-probs of the response's ids, each entry's id compared with the one that was sent."""
    values = np.empty(len(response), np.float32)
    for s, (entry, i) in enumerate(zip(_entries(reply, response), response, strict=True)):
        if entry[1] != i or not isinstance(entry[0], int | float):
            raise VerifierError(
                f"no log-prob of token {s}, id {i}, but {str(entry)[:200]}: the server scored "
                "another text than it was sent, or a proxy changed the reply"
            )
        values[s] = entry[0]
    return finite(values, response)


def texts(reply: Any, prompt: Sequence[int], response: Sequence[int]) -> list[str | None]:
    """What the server's own tokenizer writes for each id; None where it does not say."""
    return [entry[2] if len(entry) > 2 else None for entry in _entries(reply, response)]


def _entries(reply: Any, response: Sequence[int]) -> list[Any]:
    try:
        entries = reply["meta_info"]["input_token_logprobs"]
        whole = len(entries) == len(response) + 1 and all(len(entry) >= 2 for entry in entries)
    except (KeyError, TypeError):
        entries, whole = None, False
    if entries is None or not whole:
        got = f"{len(entries)} of them" if isinstance(entries, list) else str(reply)[:200]
        raise VerifierError(
            f"expected meta_info.input_token_logprobs for {len(response) + 1} tokens, got {got}: "
            "is this an SGLang server? (a vLLM server is vllm:URL)"
        )
    return entries[1:]
