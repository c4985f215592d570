"""Token rewards on veRL's streaming route: its agent loop manager and worker, extended."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import json
from contextvars import ContextVar
from typing import Any

import ray
import torch
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tracking import Tracking

from cme_reward.errors import InputError, VerifierError
from cme_reward.verl.metrics import log_along
from cme_reward.verl.outputs import KEY, attach, describe
from cme_reward.verl.samples import keeper
from cme_reward.verl.scorer import actor_metrics, ready, scorer_actor
from cme_reward.verl.settings import RewardSettings, check_settings

_validating: ContextVar[bool] = ContextVar("validating", default=False)


class TokenRewardOutput(AgentLoopOutput):
    """An output that writes a reward for each token of its response."""

    token_rewards: list[float] = Field(default_factory=list, exclude=True)

    def as_dict(self) -> dict[str, Any]:
        """veRL's fields, `rm_scores [T]` from `token_rewards`."""
        fields: dict[str, Any] = super().as_dict()
        n = len(fields["responses"])
        if len(self.token_rewards) != n:
            raise InputError(
                f"a response of {n} tokens has {len(self.token_rewards)} rewards; expected as many"
            )
        fields["rm_scores"] = torch.tensor(self.token_rewards, dtype=torch.float32)
        return fields


_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class  # the class under ray.remote


class CMEAgentLoopWorker(_Worker):
    """veRL's worker; each output of a trajectory is scored by itself, token by token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = RewardSettings.from_config(self.config)

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        _validating.set(bool(validate))
        if self.reward_loop_worker_handles is None:  # scored later, by a colocated verifier
            outputs = output if isinstance(output, list) else [output]
            notes = self._notes(outputs)
            if notes:
                kwargs["raw_prompt"] = attach(list(kwargs["raw_prompt"]), notes)
        await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
        if self.reward_loop_worker_handles is None:
            return
        if any(output.reward_score is not None for output in outputs):
            raise InputError(
                "an agent loop returned a reward_score of its own, which veRL would train on in "
                "place of CMEReward's; expected None"
            )
        notes = self._notes(outputs)
        await asyncio.gather(
            *(
                self._score_one(outputs, i, {**kwargs, KEY: json.dumps([note])})
                for i, note in enumerate(notes)
            )
        )

    def _notes(self, outputs: list[Any]) -> list[dict[str, Any]]:
        return describe(
            outputs,
            validate=_validating.get(),
            logprobs=self._settings.cme.baseline == "policy",
        )

    async def _score_one(self, outputs: list[Any], i: int, kwargs: dict[str, Any]) -> None:
        output = outputs[i]
        try:
            await super()._compute_score([output], kwargs)
            rewards = output.reward_score
        except VerifierError:
            if self.config.algorithm.adv_estimator != "cme_grpo" or _validating.get():
                raise
            # veRL would go on with the responses that are left. cme_grpo raises on NaN, before
            # the policy is touched, and says what failed.
            rewards = [float("nan")] * len(output.response_ids)
            output.extra_fields["reward_extra_info"] = {}
        given = {name: getattr(output, name) for name in output.model_fields_set}
        given["reward_score"] = float(sum(rewards))
        # veRL fills this default in place, which pydantic does not count as set.
        given["extra_fields"] = output.extra_fields
        outputs[i] = TokenRewardOutput(**given, token_rewards=rewards)


class CMEAgentLoopManager(AgentLoopManagerTQ):
    """veRL's manager with workers that carry a reward for each token.

    Named in `actor_rollout_ref.rollout.agent.agent_loop_manager_class`. It lives in the trainer's
    process: it checks the configuration, loads the verifier before the first step, adds the
    reward's metrics to veRL's, and keeps samples beside veRL's log.

    Raises:
        ConfigError: for a configuration in which the reward would be lost or changed.
        VerifierError: if the verifier does not load.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self._settings = check_settings(config)
        super().__init__(config, *args, **kwargs)
        self.agent_loop_workers_class = ray.remote(CMEAgentLoopWorker)
        log_along(Tracking, actor_metrics, keeper(config) if self._settings.samples else None)

    async def _init_agent_loop_workers(self) -> None:
        if self._settings.verifier != "hosted":  # that one sleeps until veRL wakes it
            self._scorer = scorer_actor(self.config)  # lives as long as this handle
            name = await ready(self._scorer, self._settings)
            print(f"cme_reward: verifier {name}", flush=True)
        await super()._init_agent_loop_workers()
