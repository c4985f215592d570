"""`python -m cme_reward.openrlhf`: OpenRLHF's trainer with per-token rewards, and its own flags."""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cme_reward.errors import ConfigError
from cme_reward.openrlhf.checks import FLAT, check_arguments, flag, version
from cme_reward.openrlhf.settings import PREFIX, load_settings, variables

HOOK = "cme_reward.openrlhf.install"
ENTRY = "openrlhf.cli.train_ppo_ray"


def main(arguments: list[str] | None = None) -> None:
    """Run `openrlhf.cli.train_ppo_ray` with these flags, per token unless `remote_url` is given.

    Without a reward among the flags, the agent of this package is used. With `--reward.remote_url`
    and no agent, OpenRLHF trains on sequence rewards, and nothing is changed in it.

    Raises:
        ConfigError: for settings or flags that do not go together.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = version()
    policy = _value(arguments, "actor.model_name_or_path")
    if policy is not None:
        os.environ.setdefault(f"{PREFIX}GENERATOR_TOKENIZER", policy)
    per_token = not (
        _value(arguments, "reward.remote_url") and not _value(arguments, "train.agent_func_path")
    )
    if not {"-h", "--help"} & set(arguments):
        settings = load_settings("token" if per_token else "sequence")
        if not per_token and settings.config.level == "token":
            raise ConfigError(
                f"level='token' and {flag('reward.remote_url')} do not go together: a reward "
                "function returns one number per response. Leave one of them out"
            )
        if not per_token and settings.samples:
            raise ConfigError(
                f"samples={settings.samples} and {flag('reward.remote_url')} do not go together: "
                "rollouts are kept with per-token rewards. Leave one of them out"
            )
    if per_token:
        if _value(arguments, "train.agent_func_path") is None:
            file = Path(__file__).with_name("agent.py")
            arguments = [flag("train.agent_func_path"), str(file), *arguments]
        _check_when_parsed()
    _carry_into_workers(known, hook=per_token)
    sys.argv = [ENTRY, *arguments]
    runpy.run_module(ENTRY, run_name="__main__", alter_sys=True)


def _value(arguments: list[str], name: str) -> str | None:
    """What the command line gives for an argument, in either style; the last one counts."""
    found = None
    for flag_name in (f"--{name}", f"--{FLAT[name]}"):
        for k, text in enumerate(arguments):
            if text == flag_name and k + 1 < len(arguments):
                found = arguments[k + 1]
            elif text.startswith(f"{flag_name}="):
                found = text.partition("=")[2]
    return found


def _check_when_parsed() -> None:
    """Check the arguments as soon as OpenRLHF has parsed them, before it starts anything."""
    import openrlhf.utils as utils  # type: ignore

    original = utils.get_strategy

    @functools.wraps(original)
    def get_strategy(args: Any) -> Any:
        check_arguments(args)
        return original(args)

    utils.get_strategy = get_strategy


def _carry_into_workers(known: tuple[int, ...], *, hook: bool) -> None:
    """Add the settings, and the installer, to what OpenRLHF tells Ray about its workers."""
    import ray  # type: ignore

    original: Callable[..., Any] = ray.init
    of_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (of_job.get("runtime_env") or {}).get("env_vars") or {}

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> Any:
        environment = dict(kwargs.get("runtime_env") or {})
        own = {name: value for name, value in variables().items() if name not in given}
        environment["env_vars"] = own | dict(environment.get("env_vars") or {})
        if hook:
            environment["worker_process_setup_hook"] = HOOK
        kwargs["runtime_env"] = environment
        return original(*args, **kwargs)

    ray.init = init
