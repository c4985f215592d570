"""`python -m cme_reward.verl CONFIG.yaml` stands for a command of veRL's own."""

# pyright: reportMissingImports=false
from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from cme_reward import ConfigError
from cme_reward.verl.launch import compose, expand, main, read_config, to_override
from cme_reward.verl.settings import check_settings

FILE = """
reward_fn: cme_reward.verl:CMEReward
cme:
  verifier: embedded
  eps: 0.2
  eos: mask
data:
  train_batch_size: 16
actor_rollout_ref:
  model:
    path: some/policy
    +override_config.attn_implementation: sdpa
  actor:
    optim: {lr: 3e-6}
trainer:
  logger: [console, tensorboard]
"""

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\r\n$"), max_size=12)
    | st.sampled_from(
        ["null", "true", "1e-6", "3", "it's", "\\", "\\'", "a,b", "{a}", "a=b", "A²"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(VALUES)
def test_values_come_out_of_hydras_parser_as_they_went_in(value: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"++key={to_override(value)}"])
    assert plain(override.value()) == value


def plain(value: Any) -> Any:
    """A parsed value without hydra's marks of how it was quoted."""
    if isinstance(value, dict):
        return {str(getattr(key, "text", key)): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return getattr(value, "text", value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


def test_the_file_becomes_verls_keys(file: Path) -> None:
    config = compose(expand(read_config(file), ["cme.whitespace=keep", "trainer.total_epochs=3"]))
    assert config.reward.reward_manager.source == "importlib"
    assert config.reward.reward_manager.module.path == "pkg://cme_reward.verl"
    assert config.reward.reward_manager.name == "CMEReward"
    assert config.algorithm.adv_estimator == "cme_grpo"
    assert dict(config.algorithm.cme) == {"eps": 0.2}
    assert dict(config.reward.cme) == {"verifier": "embedded", "eos": "mask", "whitespace": "keep"}
    assert config.actor_rollout_ref.rollout.agent.agent_loop_manager_class == (
        "cme_reward.verl.CMEAgentLoopManager"
    )
    assert config.data.train_batch_size == 16
    assert config.actor_rollout_ref.actor.optim.lr == 3e-6  # a string to PyYAML
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"
    assert list(config.trainer.logger) == ["console", "tensorboard"]
    assert config.trainer.total_epochs == 3


def test_the_sequence_level_takes_verls_own_grpo(file: Path) -> None:
    settings = read_config(file)
    with pytest.raises(ConfigError, match=r"cme\.eps=0\.2 would have no effect"):
        expand(settings, ["cme.level=sequence"])
    del settings["cme"]["eps"]
    config = compose(expand(settings, ["cme.level=sequence"]))
    assert config.algorithm.adv_estimator == "grpo"
    assert config.reward.cme.level == "sequence"
    assert "cme" not in config.algorithm
    again = compose(expand(settings, ["cme.credit=sequence"]))
    assert again.algorithm == config.algorithm
    assert again.reward.cme == config.reward.cme


def test_what_a_token_is_credited_with_is_the_estimators(file: Path) -> None:
    config = compose(expand(read_config(file), ["cme.credit=return", "cme.gamma=0.9"]))
    assert config.algorithm.cme == {"credit": "return", "gamma": 0.9, "eps": 0.2}
    assert not {"credit", "gamma"} & set(config.reward.cme)
    assert check_settings(config).cme.gamma == 0.9


def test_a_hosted_verifier_is_switched_on(file: Path) -> None:
    config = compose(expand(read_config(file), ["cme.verifier=hosted"]))
    assert config.reward.reward_model.enable is True
    assert config.reward.reward_model.rollout.free_cache_engine is True
    pool = {**read_config(file), "reward": {"reward_model": {"enable_resource_pool": True}}}
    config = compose(expand(pool, ["cme.verifier=hosted"]))
    assert config.reward.reward_model.rollout.free_cache_engine is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cme: {verifier: embedded}", "reward_fn=None"),
        ("reward_fn: CMEReward", "expected MODULE:CLASS"),
        ("reward_fn: cme_reward.verl:CMEReward\ncme: embedded", "expected a block"),
        ("[1, 2", "cannot read"),
        ("- a", "holds no settings"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        expand(read_config(path))


def test_mistakes_are_found_before_anything_starts(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, message in [
        ("trainer.total_epoch=1", "Did you mean trainer.total_epochs?"),
        ("cme.epsilon=1", "did you mean 'eps'"),
        ("algorithm.adv_estimator=rloo", "credit per token is lost"),
        ("algorithm.use_kl_in_reward=True", "use_kl_loss=True"),
    ]:
        assert main([str(file), override]) == 2
        assert message in capsys.readouterr().err


def test_the_printed_command_is_the_one_that_would_run(file: Path) -> None:
    command = [sys.executable, "-m", "cme_reward.verl", str(file), "--print-config", "cme.eps=0.3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    assert words[3:] == expand(read_config(file), ["cme.eps=0.3"])
