"""What all tests may ask for: tokenizers of every kind, awkward texts, and CME_SHARED."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Of models as small as these, threads only wait for each other. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tokenizer_kinds import BUILDERS, REAL, SHARED, TEXTS, by_name, load_tokenizer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tokenizer" in metafunc.fixturenames:
        metafunc.parametrize("tokenizer", by_name([*BUILDERS, *REAL]), indirect=True)


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(request.param)


@pytest.fixture(scope="session")
def shared() -> Path | None:
    """The folder of real tokenizers, texts and models, if there is one."""
    return SHARED


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Awkward texts in many scripts."""
    return TEXTS
