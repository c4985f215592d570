"""Agent loops for tests: a tool's text inside a response, and several outputs per trajectory."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class ToolText(SingleTurnAgentLoop):
    """Two turns of the policy with a tool's words between them, in one output."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        half = {**sampling_params, "max_tokens": 8}
        output = await super().run(half, **kwargs)
        again = await super().run(half, **kwargs)
        tool = self.tokenizer.encode(" tool says 7", add_special_tokens=False)
        output.response_ids = output.response_ids + tool + again.response_ids
        output.response_mask = output.response_mask + [0] * len(tool) + again.response_mask
        if output.response_logprobs is not None and again.response_logprobs is not None:
            output.response_logprobs = (
                output.response_logprobs + [0.0] * len(tool) + again.response_logprobs
            )
        output.num_turns = 4
        return output


class TwoOutputs(SingleTurnAgentLoop):
    """Each of two turns as an output of its own; the second's prompt is all that was before."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        half = {**sampling_params, "max_tokens": 8}
        first = await super().run(half, **kwargs)
        again = await super().run(half, **kwargs)
        tool = self.tokenizer.encode(" tool says 7", add_special_tokens=False)
        again.prompt_ids = first.prompt_ids + first.response_ids + tool
        return [first, again]
