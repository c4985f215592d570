"""Cross-model entropy in OpenRLHF: a reward function, agents, and the way into its trainer.

`python -m cme_reward.openrlhf` takes the flags of `openrlhf.cli.train_ppo_ray` and trains with
per-token rewards. Names come with their modules when first used: Ray runs `install` in every worker
process, most of which need none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cme_reward._lazy import lazy
from cme_reward.openrlhf.hook import install

if TYPE_CHECKING:
    from cme_reward.openrlhf.agent import AgentExecutor, MultiTurnAgentExecutor
    from cme_reward.openrlhf.launch import main
    from cme_reward.openrlhf.reward import reward_func

__all__ = ["AgentExecutor", "MultiTurnAgentExecutor", "install", "main", "reward_func"]

_HOMES = {
    "AgentExecutor": "agent",
    "MultiTurnAgentExecutor": "agent",
    "main": "launch",
    "reward_func": "reward",
}
__getattr__ = lazy(__name__, _HOMES, needs=["openrlhf"], extra="openrlhf")
