"""The adapter's part of veRL's configuration, and what must hold in the rest of it."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from cme_reward._settings import check_names, kinds_of, plain, read_settings
from cme_reward.advantages import Credit, Scale
from cme_reward.config import CMEConfig, Level
from cme_reward.errors import ConfigError

TESTED = ((0, 9), (0, 10))
"""First veRL version that is supported, and first that is not."""

SUMMING = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "gdpo",
    "rloo",
    "rloo_vectorized",
    "reinforce_plus_plus_baseline",
    "gpg",
    "opo",
)
"""Estimators of veRL 0.9 that add up a response's rewards: which token earned them is lost."""

MANAGER = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
LEGACY = ("custom_reward_function", "reward_model", "sandbox_fusion")


@dataclass(frozen=True)
class EstimatorSettings:
    """`algorithm.cme`: the options of `cme_grpo`, with the meaning they have in `CMEConfig`."""

    level: Level = CMEConfig.level
    credit: Credit = CMEConfig.credit
    gamma: float = CMEConfig.gamma
    scale: Scale = CMEConfig.scale
    eps: float = CMEConfig.eps

    @classmethod
    def from_algorithm(cls, algorithm: Mapping[str, Any] | None) -> EstimatorSettings:
        given = _section((algorithm or {}).get("cme"))
        config = CMEConfig(**read_settings(given, kinds_of(cls), section="algorithm.cme"))
        return cls(**{name: getattr(config, name) for name in kinds_of(cls)})


ESTIMATOR_KEYS = tuple(kinds_of(EstimatorSettings))
ESTIMATOR_ONLY = tuple(key for key in ESTIMATOR_KEYS if key != "level")
"""Settings that the reward itself does not need."""


@dataclass(frozen=True)
class RewardSettings:
    """`reward.cme`: the fields of `CMEConfig` but those of `ESTIMATOR_ONLY`, and these."""

    cme: CMEConfig
    verifier: str
    """A spec for `load_verifier`, or "hosted" for the model that veRL serves
    (`reward.reward_model`)."""

    reward: str = "cme"
    """"cme", or a control: "random" (the verifier untrained) or "self" (the policy as it was)."""

    verifier_options: dict[str, Any] = field(default_factory=dict)
    """Keywords for `load_verifier`, such as `dtype` or `total_seconds`."""

    num_gpus: float = 0.0
    """GPUs of the actor that holds an in-process verifier, besides those of veRL's own pools."""

    num_cpus: float = 0.0
    """CPUs of that actor. 0 makes Ray place it anywhere, with one thread for a model on the CPU."""

    max_batch_tokens: int = 65_536
    """Most tokens in one batch of an in-process verifier."""

    start_seconds: float = 600.0
    """Longest wait for the verifier to load."""

    samples: int = 0
    """How many responses of a step, and of a validation, are kept beside veRL's log, for the heat
    maps of `cme-reward report`: of every step at first, then of ever fewer."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RewardSettings:
        """From veRL's whole configuration.

        Raises:
            ConfigError: for an unknown key, or none that says which verifier.
        """
        given = _section(config["reward"].get("cme"))
        of_reward = kinds_of(CMEConfig)
        kinds = {n: kind for n, kind in kinds_of(cls).items() if n != "cme"} | dict(of_reward)
        check_names(given, kinds, section="reward.cme")
        for key in ESTIMATOR_ONLY:
            if key in given:
                raise ConfigError(
                    f"reward.cme.{key}={given[key]!r} would have no effect: the estimator reads "
                    f"algorithm.cme.{key}. Set that"
                )
        hosted = config["reward"]["reward_model"]["enable"]
        verifier = given.get("verifier") or ("hosted" if hosted else None)
        reward = str(given.get("reward") or "cme")
        # Of the rewards that are refused, what is said does not depend on a verifier.
        if reward != "cme" and (verifier or reward != "random"):
            policy = str(config["actor_rollout_ref"]["model"]["path"])
            # Here: this module is in every process, and comparators bring models' code.
            from cme_reward.comparators import verifier_spec

            verifier = verifier_spec(reward, str(verifier), policy)
        if verifier is None:
            raise ConfigError(
                "reward.cme.verifier is not set; expected a spec such as "
                "+reward.cme.verifier=hf:google/gemma-3-1b-it, or a model that veRL hosts "
                "(reward.reward_model.enable=True)"
            )
        if (verifier == "hosted") != bool(hosted):
            raise ConfigError(
                f"reward.cme.verifier={verifier!r} with reward.reward_model.enable={hosted}: "
                'expected "hosted" with True, a spec such as "hf:NAME" with False'
            )
        estimator = EstimatorSettings.from_algorithm(config["algorithm"])
        own = read_settings({**given, "verifier": verifier}, kinds, section="reward.cme")
        if own.get("samples", 0) < 0:
            raise ConfigError(
                f"reward.cme.samples={own['samples']}; expected how many responses to keep, or 0"
            )
        settings = {name: own.pop(name) for name in of_reward if name in own}
        cme = CMEConfig(**settings, **{name: getattr(estimator, name) for name in ESTIMATOR_ONLY})
        return cls(cme=cme, **own)


def check_version() -> None:
    """Refuse a veRL whose internals have not been looked at.

    Raises:
        ConfigError: naming the version and the range.
    """
    found = version("verl")
    first, last = (".".join(map(str, bound)) for bound in TESTED)
    if not TESTED[0] <= tuple(int(part) for part in found.split(".")[:2]) < TESTED[1]:
        raise ConfigError(
            f"veRL {found} is outside the range that cme_reward.verl is made for: expected "
            f'>= {first}, < {last}. Run pip install "verl>={first},<{last}"'
        )


def check_settings(config: Mapping[str, Any]) -> RewardSettings:
    """Refuse what would silently change, lose or ignore the reward.

    Args:
        config: veRL's whole configuration.

    Raises:
        ConfigError: naming the setting, what it would do, and what to set instead.
    """
    check_version()
    _check_legacy(config)
    settings = RewardSettings.from_config(config)
    estimator = config["algorithm"]["adv_estimator"]
    if settings.cme.level == "token" and estimator in SUMMING:
        raise ConfigError(
            f"algorithm.adv_estimator={estimator!r} adds up a response's rewards, and credit per "
            "token is lost. Set algorithm.adv_estimator=cme_grpo, or +reward.cme.level=sequence"
        )
    if estimator == "cme_grpo":
        _check_estimator(config, settings)
    elif given := _section(config["algorithm"].get("cme")):
        raise ConfigError(
            f"algorithm.cme={given!r} would have no effect: "
            f"algorithm.adv_estimator={estimator!r} does not read it. Set cme_grpo, or leave it out"
        )
    rollout, reward = config["actor_rollout_ref"]["rollout"], config["reward"]
    loss_mode = config["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"]
    if settings.cme.level == "token" and loss_mode == "geo_mean":
        raise ConfigError(
            "actor_rollout_ref.actor.policy_loss.loss_mode='geo_mean' takes the mean of a "
            "response's advantages, and credit per token is lost. Set vanilla, or "
            "+reward.cme.level=sequence"
        )
    if settings.cme.baseline == "policy" and not rollout["calculate_log_probs"]:
        raise ConfigError(
            "reward.cme.baseline='policy' needs the sampler's log-probs; set "
            "actor_rollout_ref.rollout.calculate_log_probs=True"
        )
    if not config["trainer"]["use_v1"]:
        raise ConfigError(
            "trainer.use_v1=False starts a trainer that carries one reward per response; set "
            "trainer.use_v1=True"
        )
    if not rollout["agent"].get("agent_loop_manager_class"):
        raise ConfigError(
            f"{MANAGER} is not set: veRL's own manager carries one reward per response, and does "
            f"not say which tokens a tool wrote. Set +{MANAGER}=cme_reward.verl.CMEAgentLoopManager"
        )
    if reward["reward_model"]["enable"] and not reward["custom_reward_function"]["path"]:
        raise ConfigError(
            "with reward.reward_model.enable=True and no reward.custom_reward_function.path veRL "
            "asks the verifier for a classification. Set "
            "reward.custom_reward_function.path=pkg://cme_reward.verl (a function that does "
            "nothing)"
        )
    hosted = reward["reward_model"]
    pool = hosted["enable"] and hosted["enable_resource_pool"]
    if pool and hosted["rollout"]["free_cache_engine"]:
        raise ConfigError(
            "with reward.reward_model.enable_resource_pool=True and free_cache_engine=True veRL "
            "puts the verifier to sleep when it starts, and never wakes it. Set "
            "reward.reward_model.rollout.free_cache_engine=False"
        )
    return settings


def refuse_kl_in_reward(algorithm: Mapping[str, Any] | None) -> None:
    """The KL term would be added to masked tokens too, which a zero marks.

    Raises:
        ConfigError: with the remedy.
    """
    if algorithm is not None and algorithm.get("use_kl_in_reward"):
        raise ConfigError(
            "algorithm.use_kl_in_reward=True adds a KL term to every token's reward, masked tokens "
            "included, and cme_grpo could no longer tell them apart. Set "
            "algorithm.use_kl_in_reward=False and actor_rollout_ref.actor.use_kl_loss=True"
        )


def _check_estimator(config: Mapping[str, Any], settings: RewardSettings) -> None:
    algorithm = config["algorithm"]
    refuse_kl_in_reward(algorithm)
    estimator = EstimatorSettings.from_algorithm(algorithm)
    if estimator.level != settings.cme.level:
        raise ConfigError(
            f"reward.cme.level={settings.cme.level!r}, but "
            f"algorithm.cme.level={estimator.level!r}; expected the same"
        )
    if not algorithm.get("norm_adv_by_std_in_grpo", True) and estimator.scale != "none":
        raise ConfigError(
            "algorithm.norm_adv_by_std_in_grpo=False is for veRL's own GRPO and would have no "
            "effect; set +algorithm.cme.scale=none"
        )


def _check_legacy(config: Mapping[str, Any]) -> None:
    for section in LEGACY:
        for key, value in _leaves(_section(config.get(section)), section):
            raise ConfigError(
                f"{key}={value!r} is a key of older versions, which veRL ignores; the section is "
                f"now reward.{section}"
            )


def _leaves(section: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.{key}")
        elif value is not None:
            yield f"{name}.{key}", value


def _section(given: Any) -> dict[str, Any]:
    """A section of the configuration as plain dicts and lists."""
    section = {} if given is None else plain(given)
    if not isinstance(section, dict):
        raise ConfigError(f"{section!r} is no section of settings; expected keys and values")
    return section
