"""What OpenRLHF's processes are told by environment variables, and by a file that one names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cme_reward._settings import (
    check_choices,
    check_names,
    kinds_of,
    read_environment,
    read_settings,
    read_yaml,
)
from cme_reward.config import CMEConfig, Level
from cme_reward.errors import ConfigError

PREFIX = "CME_"
FILE = "CME_SETTINGS"
SECRETS = ("CME_API_KEY",)


@dataclass(frozen=True)
class Settings:
    """Settings of the OpenRLHF adapter, and in `config` those of the reward.

    OpenRLHF constructs a reward function or an agent without arguments, in processes of its own, so
    that all settings come from the environment: `CME_VERIFIER=...` for `verifier`, and likewise for
    every other one and for every setting of `CMEConfig` (`CME_EPS=0.05`). `CME_SETTINGS` names a
    YAML file of the same names in lower case; a variable wins over the file.
    """

    verifier: str
    """A spec of `load_verifier`."""

    verifier_options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of `load_verifier`, such as `{"dtype": "bfloat16"}`."""

    verifier_placement: Literal["shared", "process"] = "shared"
    """"shared": a verifier with weights is loaded once, in a Ray actor of its own that all rollout
    processes ask. "process": once in every rollout process. Servers are always asked directly."""

    verifier_gpus: float | None = None
    """GPUs of the shared actor. None: 1 where Ray has GPUs, else 0."""

    verifier_wait: float = 900.0
    """Most seconds that the shared actor may take to be placed and to load."""

    reward: str = "cme"
    """"cme", or a control: "random" (the verifier untrained) or "self" (the policy as it was, which
    `generator_tokenizer` names)."""

    generator_tokenizer: str | None = None
    """Name or path of the policy's tokenizer, for `reward_func`, which is handed text alone."""

    environment_weight: float = 1.0
    """Nats by which one unit of a multi-turn environment's own reward raises the reward of each of
    the response's tokens."""

    samples: int = 0
    """How many rollouts of a step the trainer keeps beside its log, for the heat maps of
    `cme-reward report`: of every step at first, then of ever fewer."""

    config: CMEConfig = field(default_factory=CMEConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        if not isinstance(self.verifier_options, Mapping):
            raise ConfigError(
                f"verifier_options={self.verifier_options!r} must be a mapping, such as "
                "{dtype: bfloat16}"
            )
        if self.samples < 0:
            raise ConfigError(f"samples={self.samples}; expected how many rollouts to keep, or 0")


_REWARD = kinds_of(CMEConfig)
_KINDS = {n: kind for n, kind in kinds_of(Settings).items() if n != "config"} | dict(_REWARD)


def load_settings(level: Level = "token", environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment and the file it names.

    Args:
        level: `CMEConfig.level` where nothing says otherwise.
        environ: in place of `os.environ`.

    Raises:
        ConfigError: if no verifier is named, the file cannot be read, or a setting in it is
            unknown; names the nearest known one.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {"level": level}
    if environ.get(FILE):
        values |= _read_file(environ[FILE])
    values |= read_environment(_KINDS, PREFIX, environ)
    reward = str(values.get("reward", "cme"))
    # Of the rewards that are refused, what is said does not depend on a verifier.
    if reward != "cme" and (values.get("verifier") or reward != "random"):
        policy = values.get("generator_tokenizer")
        if reward == "self" and not policy:
            raise ConfigError(
                "reward='self' needs the policy as it was before training: set "
                "CME_GENERATOR_TOKENIZER to what --actor.model_name_or_path says"
            )
        from cme_reward.comparators import verifier_spec

        values["verifier"] = verifier_spec(reward, str(values.get("verifier")), str(policy))
    if not values.get("verifier"):
        raise ConfigError(
            "no verifier is named: set the environment variable CME_VERIFIER, for example to "
            f"vllm:http://localhost:8000, or `verifier:` in a YAML file that {FILE} names. Under "
            "`ray job submit` it belongs into env_vars of --runtime-env-json"
        )
    values = read_settings(values, _KINDS)
    config = CMEConfig(**{name: values.pop(name) for name in _REWARD if name in values})
    return Settings(**values, config=config)


def variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that every process of a run needs. Secrets are not among them: Ray shows
    the environment of a job to whoever can see its dashboard."""
    environ = os.environ if environ is None else environ
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name not in SECRETS
    }


def _read_file(path: str) -> dict[str, Any]:
    values = read_yaml(path, f"the settings in {FILE}=", "verifier: ...")
    if isinstance(values.get("cme"), dict):  # as CMEConfig.from_yaml reads it
        values |= values.pop("cme")
    check_names(values, _KINDS, file=path)
    return values
