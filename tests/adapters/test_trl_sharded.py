"""TRL where processes share the policy's weights out among them, and each has a verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import __version__ as transformers_version
from trl_sharded import ASKED, check, sharded

from cme_reward import load_verifier

pytestmark = pytest.mark.slow


@pytest.mark.skipif(transformers_version < "5", reason="transformers 4 has FSDP on GPUs only")
def test_fsdp_that_loads_weights_in_one_process(tmp_path: Path) -> None:
    """transformers gives zeros to the second process there, for FSDP to fill in."""
    verifier: Any = load_verifier("embedded", device="cpu")
    check(sharded(tmp_path, "fsdp"), verifier.logprobs(*ASKED))
