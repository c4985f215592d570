"""A configuration under which rewards would be lost or changed does not start."""

# pyright: reportMissingImports=false
from __future__ import annotations

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from cme_reward import ConfigError
from cme_reward.verl import settings
from cme_reward.verl.settings import SUMMING, EstimatorSettings, RewardSettings, check_settings

TOKEN = "credit per token is lost"
REFUSED = [
    *[({"algorithm.adv_estimator": name}, TOKEN) for name in SUMMING],
    ({"actor_rollout_ref.actor.policy_loss.loss_mode": "geo_mean"}, TOKEN),
    ({"algorithm.use_kl_in_reward": True}, r"actor_rollout_ref\.actor\.use_kl_loss=True"),
    ({"algorithm.norm_adv_by_std_in_grpo": False}, r"\+algorithm\.cme\.scale=none"),
    ({"algorithm.cme": {"esp": 1}}, r"algorithm\.cme\.esp; did you mean 'eps'"),
    ({"algorithm.cme": {"eps": -1}}, "eps=-1"),
    ({"reward.cme.credit": "return"}, r"the estimator reads algorithm\.cme\.credit"),
    (
        {"algorithm.adv_estimator": "gae", "algorithm.cme": {"credit": "return"}},
        r"algorithm\.adv_estimator='gae' does not read it\. Set cme_grpo",
    ),
    ({"algorithm.cme": {"level": "sequence"}}, "expected the same"),
    ({"reward.cme.eps": 1.0}, r"the estimator reads algorithm\.cme\.eps"),
    ({"reward.cme.verifyer": "embedded"}, r"reward\.cme\.verifyer; did you mean 'verifier'"),
    ({"reward.cme.verifier": None}, r"reward\.cme\.verifier is not set"),
    ({"reward.cme.verifier": "hosted"}, r"reward\.reward_model\.enable=False"),
    ({"reward.reward_model.enable": True}, 'expected "hosted" with True'),
    ({"reward.cme.eos": "maks"}, "eos='maks'"),
    ({"reward.cme.samples": -1}, r"reward\.cme\.samples=-1; expected how many"),
    ({"reward.cme.reward": "ttrl"}, "reward='ttrl' is a vote over all rollouts"),
    ({"reward.cme.reward": "evol_rl"}, "reward='evol_rl' is a vote over all rollouts"),
    ({"reward.cme.reward": "format-length"}, "reward='format-length' is a function of the text"),
    ({"reward.cme.reward": "rent"}, "reward='rent' is made of the policy's distributions"),
    ({"reward.cme": {"reward": "rent"}}, "reward='rent' is made of"),
    ({"reward.cme": {"reward": "random"}}, r"reward\.cme\.verifier is not set"),
    ({"reward.cme": ["eos"]}, "expected keys and values"),
    (
        {"reward.cme.baseline": "policy", "actor_rollout_ref.rollout.calculate_log_probs": False},
        r"calculate_log_probs=True",
    ),
    ({"trainer.use_v1": False}, r"trainer\.use_v1=True"),
    (
        {"actor_rollout_ref.rollout.agent.agent_loop_manager_class": None},
        r"agent_loop_manager_class=cme_reward\.verl\.CMEAgentLoopManager",
    ),
    (
        {
            "reward.cme.verifier": "hosted",
            "reward.reward_model.enable": True,
            "reward.custom_reward_function.path": None,
        },
        r"custom_reward_function\.path=pkg://cme_reward\.verl",
    ),
    (
        {
            "reward.cme.verifier": "hosted",
            "reward.reward_model.enable": True,
            "reward.reward_model.enable_resource_pool": True,
        },
        r"never wakes it\. Set reward\.reward_model\.rollout\.free_cache_engine=False",
    ),
    ({"custom_reward_function.path": "mine.py"}, r"now reward\.custom_reward_function"),
    ({"reward_model.enable": True}, r"now reward\.reward_model"),
    ({"reward_model.model.path": "m"}, r"reward_model\.model\.path='m' is a key of older"),
    ({"reward_model.rollout.name": "vllm"}, "which veRL ignores"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(config: Any, changes: dict[str, Any], message: str) -> None:
    check_settings(config)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    with pytest.raises(ConfigError, match=message):
        check_settings(config)


def test_the_controls_are_verifiers(config: Any) -> None:
    policy = config.actor_rollout_ref.model.path
    for reward, verifier in (("random", r"random:.*embedded"), ("self", f"hf:{policy}")):
        OmegaConf.update(config, "reward.cme.reward", reward, force_add=True)
        assert re.fullmatch(verifier, check_settings(config).verifier)


def test_the_trainers_process_refuses_too(config: Any) -> None:
    """Where the stock main is started with veRL's own keys, before the first step."""
    from cme_reward.verl import CMEAgentLoopManager

    config.algorithm.adv_estimator = "grpo"
    with pytest.raises(ConfigError, match=TOKEN):
        CMEAgentLoopManager.create(config=config, llm_client=None)


ACCEPTED = [
    {"algorithm.adv_estimator": "gae"},
    {"algorithm.adv_estimator": "grpo", "reward.cme.level": "sequence"},
    {
        "algorithm.adv_estimator": "grpo",
        "reward.cme.level": "sequence",
        "algorithm.use_kl_in_reward": True,
    },
    {"reward.cme.level": "sequence", "algorithm.cme": {"level": "sequence"}},
    {"algorithm.norm_adv_by_std_in_grpo": False, "algorithm.cme": {"scale": "none"}},
    {"reward.cme.baseline": "policy"},
    {"actor_rollout_ref.actor.policy_loss.loss_mode": "gspo"},
    {"actor_rollout_ref.actor.use_kl_loss": True},
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_accepted(config: Any, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    check_settings(config)


@pytest.mark.parametrize("found", ["0.8.0", "0.10.0", "1.0.0", "0.7.1.dev3"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(settings, "version", lambda name: found)
    with pytest.raises(ConfigError, match=rf"veRL {found} is outside .* >= 0\.9, < 0\.10"):
        settings.check_version()


@pytest.mark.parametrize("found", ["0.9.0", "0.9.1", "0.9.3.dev0"])
def test_tested_versions_are_not(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(settings, "version", lambda name: found)
    settings.check_version()


def test_settings_reach_where_they_are_used(config: Any) -> None:
    config.reward.cme.eos = "mask"
    config.reward.cme.num_gpus = 1
    config.reward.cme.chat_template_kwargs = {"enable_thinking": False}
    config.algorithm.cme = {"eps": 0.5}
    settings = RewardSettings.from_config(config)
    assert (settings.cme.eos, settings.cme.eps, settings.num_gpus) == ("mask", 0.5, 1)
    assert settings.cme.chat_template_kwargs == {"enable_thinking": False}
    assert settings.verifier_options == {"dtype": "float64"}
    assert EstimatorSettings.from_algorithm(config.algorithm).eps == 0.5
    plain = EstimatorSettings(level="token", credit="token", gamma=1, scale="std", eps=0.1)
    assert EstimatorSettings.from_algorithm(None) == plain
    given = {"credit": "return", "gamma": "0.9"}
    assert EstimatorSettings.from_algorithm({"cme": given}).gamma == 0.9
    assert EstimatorSettings.from_algorithm({"cme": {"credit": "sequence"}}).level == "sequence"
