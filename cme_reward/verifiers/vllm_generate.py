"""vLLM's quicker way, where a server has it: log-probs of given ids as one array.

From 0.32 on, with `--enable-scale-out` and the V2 model runner. The server then computes the asked
log-probs alone, not a ranking of the vocabulary for each position, and sends them as binary.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from cme_reward.errors import VerifierError
from cme_reward.verifiers.dialect import NotScored, finite

SHARES_PROMPTS = True


def request(model: str, prompt: Sequence[int], response: Sequence[int]) -> tuple[str, Any]:
    """Path and body that score `response`."""
    return "/inference/v1/generate", {
        "model": model,
        "token_ids": [*prompt, *response],
        "return_token_ids": True,  # the array that comes back says nothing about ids
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 1.0,
            "detokenize": False,
            "prompt_logprob_token_ids": [[i] for i in response],
            "prompt_logprob_start": len(prompt) - 1,  # the row that predicts the token after it
            # Another rollout's prompt may be in the cache. Where more than the prompt is, no row
            # could be computed, and the answer is null.
            "skip_reading_prefix_cache": False,
        },
    }


def logprobs(reply: Any, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """Log-probs of the response's ids, if the server has read the ids that were sent.

    Raises `NotScored` where the server says so.
    """
    if isinstance(reply, dict) and reply.get("prompt_token_id_logprobs", "") is None:
        raise NotScored("prompt_token_id_logprobs is null")
    try:
        ids, encoded = reply["prompt_token_ids"], reply["prompt_token_id_logprobs"]
        values = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    except (KeyError, TypeError, ValueError, EOFError, binascii.Error) as error:
        raise VerifierError(
            f"expected prompt_token_id_logprobs, an array in base64, got {str(reply)[:200]}"
        ) from error
    if ids != [*prompt, *response]:
        raise VerifierError(
            f"the server scored ids {str(ids)[:100]}, not those it was sent, "
            f"{str([*prompt, *response])[:100]}"
        )
    if values.shape != (len(response), 1) or values.dtype.kind != "f":
        raise VerifierError(
            f"log-probs of shape {values.shape} and type {values.dtype} for a response of "
            f"{len(response)} tokens; expected floats of shape ({len(response)}, 1)"
        )
    return finite(values[:, 0].astype(np.float32), response)
