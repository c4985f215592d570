from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cme_reward

PUBLIC = [
    "CMEBatch",
    "CMEConfig",
    "CMEError",
    "ConfigError",
    "CrossModelEntropy",
    "Ensemble",
    "InputError",
    "SpanTable",
    "TokenizerError",
    "Verifier",
    "VerifierError",
    "align_batch",
    "align_logprobs",
    "group_advantages",
    "load_verifier",
    "overlap_weights",
]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_the_public_names() -> None:
    assert cme_reward.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(cme_reward))
    with pytest.raises(AttributeError, match="no attribute 'CMEReward'"):
        cme_reward.CMEReward  # noqa: B018
    for name in PUBLIC:
        assert getattr(cme_reward, name).__doc__, f"{name} has no docstring"


def test_importing_takes_no_framework_and_no_model_code() -> None:
    loaded = run("import sys\nfrom cme_reward import *\nprint(*sys.modules)").split()
    for module in ("transformers", "verl", "openrlhf", "trl", "ray", "vllm", "httpx", "fastapi"):
        assert module not in loaded


def test_the_command_lines_help_takes_no_model_code() -> None:
    loaded = run("import sys, cme_reward.cli; print(*sys.modules)").split()
    assert "transformers" not in loaded
    assert "torch" not in loaded


def test_errors_are_also_the_builtin_kind() -> None:
    for name in ("ConfigError", "InputError", "TokenizerError"):
        assert issubclass(getattr(cme_reward, name), cme_reward.CMEError)
        assert issubclass(getattr(cme_reward, name), ValueError)
    assert issubclass(cme_reward.VerifierError, RuntimeError)


def test_modules_are_small() -> None:
    """One concept each; a longer file is a sign of two."""
    root = Path(cme_reward.__file__).parent
    long = {
        path.name: n
        for path in root.rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 310
    }
    assert not long


def test_the_core_does_not_know_the_frameworks() -> None:
    """Data flows one way: adapters import the core, nothing of the core imports an adapter."""
    root = Path(cme_reward.__file__).parent
    for path in root.glob("*.py"):
        if path.stem in ("verl", "openrlhf", "trl", "server", "serve_command", "cli"):
            continue
        text = path.read_text()
        for adapter in ("verl", "openrlhf", "trl", "server"):
            assert f"from cme_reward.{adapter}" not in text, path.name


def test_package_data_is_there_and_small() -> None:
    embedded = Path(cme_reward.__file__).parent / "verifiers" / "embedded"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"):
        assert (embedded / name).is_file(), name
    assert sum(path.stat().st_size for path in embedded.iterdir()) <= 8 * 1024 * 1024
