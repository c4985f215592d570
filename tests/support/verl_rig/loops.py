"""Agent loops for tests: what an environment says inside a response, between two, or between
several outputs of a trajectory."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any
from uuid import uuid4

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


OBSERVATION = "The tool says 7."


class TwoTurns(SingleTurnAgentLoop):
    """Two turns of the policy with a message between them, in one output, by veRL's own builder."""

    role = "user"

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        first, again = await self.turns(sampling_params, **kwargs)
        first.response_ids = again.prompt_ids[len(first.prompt_ids) :] + again.response_ids
        between = len(first.response_ids) - len(first.response_mask) - len(again.response_mask)
        first.response_mask = first.response_mask + [0] * between + again.response_mask
        if first.response_logprobs is not None and again.response_logprobs is not None:
            first.response_logprobs += [0.0] * between + again.response_logprobs
        first.num_turns = 4
        return first

    async def turns(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[AgentLoopOutput]:
        """Each turn as an output; the second's prompt is all that was before."""
        half = {**sampling_params, "max_tokens": 8}
        first = await super().run(half, **kwargs)
        said = self.tokenizer.decode(first.response_ids, skip_special_tokens=True)
        messages = [*kwargs["raw_prompt"], {"role": "assistant", "content": said}]
        told = [*messages, {"role": self.role, "content": OBSERVATION}]
        shown = first.prompt_ids + first.response_ids
        merged, _, _ = await self.ct_merge_context_msg(messages, told, shown, [], None)
        more = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=merged.token_ids, sampling_params=half
        )
        again = first.model_copy(deep=True)
        again.prompt_ids, again.response_ids = merged.token_ids, more.token_ids
        again.response_mask = [1] * len(more.token_ids)
        again.response_logprobs = more.log_probs
        return [first, again]


class TwoOutputs(TwoTurns):
    """Each of two turns as an output of its own."""

    role = "tool"

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        return await self.turns(sampling_params, **kwargs)
