"""A tokenizer, and verifiers behind HTTP, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from endpoint_tools import QUICK
from fake_engines import FakeEngine
from tiny_models import trained_tokenizer
from transformers import PreTrainedTokenizerFast

from cme_reward import load_verifier
from cme_reward.verifiers.endpoint import EndpointVerifier


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return trained_tokenizer()


@pytest.fixture(params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def verifiers() -> Iterator[Any]:
    """Makes verifiers that are closed at the end."""
    made: list[EndpointVerifier] = []

    def make(engine: str, *fakes: FakeEngine, **options: Any) -> EndpointVerifier:
        options = QUICK | {"tokenizer": fakes[0].tokenizer} | options
        spec = f"{engine}:{','.join(fake.url for fake in fakes)}"
        verifier = load_verifier(spec, **options)
        assert isinstance(verifier, EndpointVerifier)
        made.append(verifier)
        return verifier

    yield make
    for verifier in made:
        verifier.close()
