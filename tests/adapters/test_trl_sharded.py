"""TRL where processes share the policy's weights out among them, and each has a verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_sharded import ASKED, check, sharded

from cme_reward import load_verifier


def test_fsdp_that_loads_weights_in_one_process(tmp_path: Path) -> None:
    """transformers gives zeros to the second process there, for FSDP to fill in."""
    verifier: Any = load_verifier("embedded", device="cpu")
    check(sharded(tmp_path, "fsdp"), verifier.logprobs(*ASKED))
