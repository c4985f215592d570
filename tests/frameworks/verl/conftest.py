"""veRL's environment is its own: `nox -s verl` makes it, and `sh scripts/test` has no veRL."""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("verl") else ["test_*.py"]

if find_spec("verl"):
    os.environ["VERL_PLATFORM"] = "cpu"
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_rig"


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy and its tokenizer."""
    from verl_rig.models import make_policy

    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def composed(policy: Path) -> Any:
    from omegaconf import OmegaConf

    from cme_reward.verl.launch import compose, expand

    settings = {
        "reward_fn": "cme_reward.verl:CMEReward",
        "cme": {"verifier": "embedded", "verifier_options": {"dtype": "float64"}},
        "actor_rollout_ref": {"model": {"path": str(policy)}, "rollout": {"name": "hfcpu"}},
    }
    config = compose(expand(settings))
    OmegaConf.set_struct(config, False)
    return config


@pytest.fixture
def config(composed: Any) -> Any:
    """veRL's configuration as `reward_fn: cme_reward.verl:CMEReward` expands it; free to change."""
    return copy.deepcopy(composed)
