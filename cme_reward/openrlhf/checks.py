"""OpenRLHF's own settings: which ones carry per-token advantages, and which would lose them.

Standard library only, for it is also imported by processes that never load a model.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from cme_reward.errors import ConfigError

TESTED = ((0, 9, 1), (0, 12))
"""First OpenRLHF version that is supported, and first that is not."""

DOTTED = (0, 10, 2)
"""From here on flags and arguments are named `reward.remote_url`, before `remote_rm_url`."""

KEY = "cme_token_rewards"
"""In an agent's `extra_logs`: token rewards, a list on the axis of actions, NaN where masked."""

LOGPROBS = "cme_token_logprobs"
"""Likewise, where samples are kept: the verifier's log-probs of a response, NaN outside it."""

FLAT = {
    "actor.model_name_or_path": "pretrain",
    "actor.policy_loss_type": "policy_loss_type",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.kl.init_coef": "init_kl_coef",
    "ckpt.output_dir": "save_path",
    "data.disable_fast_tokenizer": "disable_fast_tokenizer",
    "data.max_images_per_prompt": "max_images_per_prompt",
    "reward.clip_range": "reward_clip_range",
    "reward.remote_url": "remote_rm_url",
    "reward.stop_properly_penalty_coef": "stop_properly_penalty_coef",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "train.agent_func_path": "agent_func_path",
}
"""Older names of arguments."""


def argument(args: Any, name: str, default: Any = None) -> Any:
    """An argument of OpenRLHF by its dotted name, in either style."""
    node = args
    for part in name.split("."):
        if not hasattr(node, part):
            return getattr(args, FLAT[name], default)
        node = getattr(node, part)
    return node


def flag(name: str) -> str:
    """How the installed version calls an argument on the command line."""
    return f"--{name if version() >= DOTTED else FLAT[name]}"


def version() -> tuple[int, ...]:
    """The installed OpenRLHF's version.

    Raises:
        ModuleNotFoundError: if there is none.
        ConfigError: if its internals have not been looked at, naming the range.
    """
    try:
        text = metadata.version("openrlhf")
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            'cme_reward.openrlhf needs OpenRLHF: pip install "cme-reward[openrlhf]"',
            name="openrlhf",
        ) from error
    numbers = tuple(int(n) for n in re.findall(r"\d+", text)[:3])
    first, last = (".".join(map(str, bound)) for bound in TESTED)
    if not TESTED[0] <= numbers < TESTED[1]:
        problem = (
            "has no agent executors"
            if numbers < TESTED[0]
            else "is outside the range that cme_reward.openrlhf is made for"
        )
        raise ConfigError(
            f"OpenRLHF {text} {problem}: expected >= {first}, < {last}. Run "
            f'pip install "openrlhf>={first},<{last}"'
        )
    return numbers


def check_arguments(args: Any) -> None:
    """Refuse arguments under which the per-token advantages would not reach the policy as such.

    Raises:
        ConfigError: naming the flag, what it would do, and what to set instead; or for a version
            of OpenRLHF that `version` refuses.
    """
    version()
    estimator = argument(args, "algo.advantage.estimator")
    if estimator != "group_norm":
        raise ConfigError(
            f"{flag('algo.advantage.estimator')} {estimator} is not what per-token cross-model "
            "entropy replaces: its advantages are normalised within the rollouts of a prompt. "
            "Expected group_norm"
        )
    if not argument(args, "train.agent_func_path"):
        raise ConfigError(
            "the trainer waits for token rewards (cme_reward.openrlhf.install is the "
            f"worker_process_setup_hook), but no {flag('train.agent_func_path')} is given, so that "
            "none would come. Give it a file with the agent of this package, such as "
            "adapters/openrlhf/agent.py, or leave the hook out and train on sequence rewards"
        )
    rollouts = argument(args, "rollout.n_samples_per_prompt")
    if rollouts < 2:
        raise ConfigError(
            f"{flag('rollout.n_samples_per_prompt')} {rollouts} leaves nothing to normalise a "
            "rollout by; expected at least 2 (the paper: 8)"
        )
    if argument(args, "actor.policy_loss_type", "ppo") != "ppo":
        raise ConfigError(
            f"{flag('actor.policy_loss_type')} {argument(args, 'actor.policy_loss_type')} "
            "multiplies every token's advantage by one ratio of the whole response, whose gradient "
            "gives every token the mean advantage: credit per token is lost. Expected ppo"
        )
    coef = argument(args, "reward.stop_properly_penalty_coef")
    if coef is not None:
        effect = "lower" if coef < 0 else "raise"
        raise ConfigError(
            f"{flag('reward.stop_properly_penalty_coef')} {coef} is made for rewards above 0. "
            "Cross-model entropy is a log-probability, at most 0: to "
            + (
                f"replace it by {coef} for truncated responses pays most of them for being cut off"
                if effect == "lower"
                else f"multiply that of truncated responses by {coef} brings it nearer to 0, a "
                "reward for being cut off"
            )
            + ". Leave it out: an unfinished response earns nothing for its end (eos=score); "
            "--reward.overlong_buffer_len is applied"
        )
    if argument(args, "data.disable_fast_tokenizer", False):
        raise ConfigError(
            f"{flag('data.disable_fast_tokenizer')}: the place of each token in the text is known "
            "for fast tokenizers only; leave it out"
        )
    if argument(args, "data.max_images_per_prompt", 0):
        raise ConfigError(
            f"{flag('data.max_images_per_prompt')}: the verifier reads text alone; expected "
            "prompts without images"
        )
