"""Cross-model entropy in OpenRLHF: a reward function, agents, and the way into its trainer.

`python -m cme_reward.openrlhf` takes the flags of `openrlhf.cli.train_ppo_ray` and trains with
per-token rewards. Names come with their modules when first used: Ray runs `install` in every worker
process, most of which need none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cme_reward._openrlhf.install import install

if TYPE_CHECKING:
    from cme_reward._openrlhf.agent import AgentExecutor, MultiTurnAgentExecutor
    from cme_reward._openrlhf.launch import main
    from cme_reward._openrlhf.reward import reward_func

__all__ = ["AgentExecutor", "MultiTurnAgentExecutor", "install", "main", "reward_func"]

_MODULES = {
    "AgentExecutor": "agent",
    "MultiTurnAgentExecutor": "agent",
    "main": "launch",
    "reward_func": "reward",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"cme_reward._openrlhf.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "openrlhf":
            raise
        raise ModuleNotFoundError(
            'cme_reward.openrlhf needs OpenRLHF: pip install "cme-reward[openrlhf]"',
            name="openrlhf",
        ) from error


if __name__ == "__main__":
    from cme_reward._openrlhf.launch import main

    main()
