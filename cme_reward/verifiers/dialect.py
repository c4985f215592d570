"""What an engine's protocol has to define, and what all of them share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cme_reward.errors import VerifierError
from cme_reward.verifiers.replicas import Rejected


class NotScored(VerifierError):
    """The server understood, and says that it did not score this one in this way."""


class Dialect(Protocol):
    """How an engine is asked for log-probs of token ids: a module with these names."""

    @property
    def SHARES_PROMPTS(self) -> bool:
        """Is a second response to a prompt cheaper once the first is done?"""
        ...

    def request(
        self, model: str, prompt: Sequence[int], response: Sequence[int]
    ) -> tuple[str, Any]: ...
    def logprobs(
        self, reply: Any, prompt: Sequence[int], response: Sequence[int]
    ) -> np.ndarray: ...


class TextDialect(Dialect, Protocol):
    """One that every server of the engine speaks, and that tells the texts of ids."""

    @property
    def KEY_VARIABLES(self) -> tuple[str, ...]:
        """Environment variables that may hold the API key; the first one set wins."""
        ...

    def request(
        self, model: str, prompt: Sequence[int], response: Sequence[int], *, texts: bool = False
    ) -> tuple[str, Any]: ...
    def texts(
        self, reply: Any, prompt: Sequence[int], response: Sequence[int]
    ) -> list[str | None]: ...


def finite(values_S: np.ndarray, response: Sequence[int]) -> np.ndarray:
    """The log-probs, if they are numbers."""
    for s in np.flatnonzero(~np.isfinite(values_S))[:1]:
        raise VerifierError(
            f"log-prob {values_S[s]} for token {s}, id {response[s]}; expected a finite number. "
            "Servers with prefix caching forced on for prompt log-probs return uninitialised "
            "values; models in float16 can overflow: use bfloat16"
        )
    return values_S


_REMEDIES = (
    (
        r"context|max_model_len|max_tokens|too long|longer than|maximum.*(length|tokens)",
        "CMEConfig(max_length=...) must be below the server's limit (vLLM: --max-model-len, "
        "SGLang: --context-length)",
    ),
    (
        r"vocab",
        "an id of the local tokenizer is none of the model's: give the tokenizer of the model that "
        "the server runs, load_verifier(..., tokenizer=...)",
    ),
    (
        r"logprobs",
        "the server limits log-probs: start it with --max-logprobs 1 or more",
    ),
    (
        r"model.*(not exist|not found)|(not exist|not found).*model",
        "name the model as the server does (GET /v1/models), load_verifier(..., model=...)",
    ),
)


def with_remedy(rejected: Rejected, key_variables: tuple[str, ...]) -> VerifierError:
    """The refusal with what the user can do about it."""
    # Servers answer 403 for other reasons too, for example for a path that is switched off.
    about_key = re.search(r"key|token|auth|forbid|permission|denied", rejected.message, re.I)
    if rejected.status == 401 or (rejected.status == 403 and about_key):
        remedy = f"put the server's API key into the environment variable {key_variables[0]}"
    elif rejected.status == 404 and "model" not in rejected.message.lower():
        remedy = "check the URL and the engine: vllm:URL or sglang:URL"
    else:
        remedy = next(
            (
                advice
                for pattern, advice in _REMEDIES
                if re.search(pattern, rejected.message, re.IGNORECASE | re.DOTALL)
            ),
            "the server's log says more",
        )
    return VerifierError(f"{rejected}\n{remedy}")
