"""An agent whose environment answers the first turn, and pays for the second.

For `--train.agent_func_path`. It writes in Gemma's chat template, as an environment of OpenRLHF has
to write in its policy's.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase

from cme_reward.openrlhf import MultiTurnAgentExecutor


def observation(said: str) -> str:
    return f"These are {len(said)} characters. Again, please."


def pay(said: str) -> float:
    return float(len(said) % 3)


class Environment(AgentInstanceBase):
    def __init__(self) -> None:
        self.turns = 0

    async def step(self, states: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.turns += 1
        said, done = states["action_text"], self.turns == 2
        answer = f"\n<start_of_turn>user\n{observation(said)}<end_of_turn>\n<start_of_turn>model\n"
        return {
            "rewards": torch.tensor(pay(said) if done else 0.0),
            "environment_feedback": "" if done else answer,
            "done": done,
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self) -> None:
        super().__init__(Environment)
