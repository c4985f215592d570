"""Agent executors: OpenRLHF's own, with per-token cross-model entropy as the reward."""

from __future__ import annotations

import asyncio
from typing import Any

from openrlhf.utils import agent as base  # type: ignore

from cme_reward.conversation.rendered import RenderedReader
from cme_reward.errors import ConfigError
from cme_reward.openrlhf.score import make_scorer, prompt_of, score_rollout, shown
from cme_reward.openrlhf.settings import load_settings
from cme_reward.openrlhf.verifier import open_verifier
from cme_reward.spans.pieces import vocabulary_sizes


class _Scored:
    """Scores what the executor after this one in the order of classes has rolled out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = load_settings()
        # Now, while the engine starts: a verifier that does not load ends the run at once.
        self._verifier = open_verifier(self._settings)
        self._made: asyncio.Task[Any] | None = None
        self._policy: tuple[Any, ...] = ()

    async def execute(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Roll out one prompt and score the sampled ids; the arguments are OpenRLHF's."""
        if kwargs.get("images"):
            raise ConfigError("a prompt has images; the verifier reads text alone")
        output = await super().execute(  # type: ignore[misc]
            prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, *args, **kwargs
        )
        scorer, reader = await self._scorer(hf_tokenizer)
        ranges = output["action_ranges"]
        seen = list(output["observation_tokens"][: ranges[0][0]]) if ranges else []
        rendered = shown(hf_tokenizer, prompt, seen)
        messages = await asyncio.to_thread(
            prompt_of, reader, rendered, label if rendered == prompt else None
        )
        return await score_rollout(
            scorer,
            messages,
            output,
            max_length,
            self._settings.environment_weight,
            samples=self._settings.samples > 0,
        )

    async def _scorer(self, tokenizer: Any) -> tuple[Any, RenderedReader]:
        """Made for the first rollout's tokenizer. OpenRLHF sends a new copy with every prompt."""
        policy = (tokenizer.name_or_path, vocabulary_sizes(tokenizer), tokenizer.chat_template)
        if self._made is None:
            self._policy = policy
            self._made = asyncio.create_task(asyncio.to_thread(self._make, tokenizer))
        elif policy != self._policy:
            (size, added), (first_size, first_added) = policy[1], self._policy[1]
            raise ConfigError(
                f"a rollout came with the tokenizer {policy[0]!r} ({size} tokens, {added} added) "
                f"after others with {self._policy[0]!r} ({first_size} tokens, {first_added} "
                "added); expected one policy"
            )
        return await asyncio.shield(self._made)

    def _make(self, tokenizer: Any) -> tuple[Any, RenderedReader]:
        return make_scorer(self._settings, self._verifier, tokenizer), RenderedReader(tokenizer)


class AgentExecutor(_Scored, base.SingleTurnAgentExecutor):
    """One response to each prompt, scored token by token from the sampled ids.

    For `--train.agent_func_path`, in a file that imports this name. Settings come from the
    environment, see `Settings`.
    """


class MultiTurnAgentExecutor(_Scored, base.MultiTurnAgentExecutor):
    """OpenRLHF's executor of several turns with an environment, scored turn by turn.

    What the environment writes is shown to the verifier and not scored. The environment's own
    reward, times `environment_weight`, is added to the reward of every scored token. To be
    subclassed as OpenRLHF's own is:

        class AgentExecutor(MultiTurnAgentExecutor):
            def __init__(self):
                super().__init__(MyAgentInstance)
    """
