"""The reward manager that veRL's reward workers hold."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from typing import Any

import torch
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from cme_reward.errors import CMEError, InputError, VerifierError
from cme_reward.verl.outputs import KEY, detach, digest
from cme_reward.verl.scorer import Request, Scorer, ready, scorer_actor
from cme_reward.verl.settings import check_settings


class CMEReward(RewardManagerBase):
    """Cross-model entropy as veRL's reward manager.

    Named in `reward.reward_manager`, configured in `reward.cme` (see docs/verl.md). The verifier is
    not here: all workers of a run ask one actor, which holds or reaches it.

    Args:
        config: veRL's whole configuration.
        tokenizer: the policy's.
        compute_score: veRL's reward function; not called.
        reward_router_address: of the verifier, where veRL hosts it.
        reward_model_tokenizer: the verifier's, where veRL hosts it.

    Raises:
        ConfigError: for a configuration in which the reward would be lost or changed.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        self.settings = check_settings(config)
        super().__init__(config, tokenizer, compute_score)
        self.reward_router_address = reward_router_address
        self.reward_model_tokenizer = reward_model_tokenizer
        self._scorer: Any = None
        self._ready = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self.config,
            self.tokenizer,
            self.compute_score,
            self.reward_router_address,
            self.reward_model_tokenizer,
        )

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Score one response.

        Returns:
            `reward_score`: a reward per token of the response in nats, +0.0 where masked (see
            `channel.write_rewards`); at the sequence level on the last sampled token alone.
            `reward_extra_info`: numbers that veRL logs in validation.

        Raises:
            VerifierError: if the verifier fails, or the actor that holds it is gone.
            InputError: if nothing says which tokens were sampled.
        """
        request = self._request(data)
        import ray

        try:
            if ray.is_initialized():
                # The first handle is the one that keeps the actor alive: nothing may be awaited
                # before it is kept, or a concurrent call would put its own in its place.
                if self._scorer is None:
                    self._scorer = scorer_actor(self.config, self.reward_router_address)
                if not self._ready:
                    await ready(self._scorer, self.settings)
                    self._ready = True
                scored = await self._scorer.score.remote(request)
            else:
                self._scorer = self._scorer or Scorer(self.config, self.reward_router_address)
                scored = await self._scorer.score(request)
        except CMEError as error:
            # Ray's own class for it hides which of ours it is, once it went through two actors.
            kind = next(k for k in type(error).__mro__ if k.__module__ == CMEError.__module__)
            raise kind(str(error)) from None
        except ray.exceptions.RayError as error:
            raise VerifierError(
                f"the actor that holds the verifier {self.settings.verifier!r} failed: {error}"
            ) from error
        return {"reward_score": scored["rewards"].tolist(), "reward_extra_info": scored["info"]}

    def _request(self, data: Any) -> Request:
        item = data[-1]
        response_ids = item.batch["responses"]
        attended = item.batch["attention_mask"]
        prompt_ids = item.batch["prompts"][attended[: -len(response_ids)].bool()].tolist()
        ids = response_ids[attended[-len(response_ids) :].bool()].tolist()
        fields = item.non_tensor_batch
        prompt, notes = detach(list(fields["raw_prompt"]))
        if KEY in fields:
            notes = json.loads(str(fields[KEY]))
        if not notes:
            if int(fields.get("__num_turns__", 2)) > 2:
                raise InputError(
                    f"a response of {int(fields['__num_turns__'])} turns came without a mask of "
                    "its sampled tokens. Expected actor_rollout_ref.rollout.agent."
                    "agent_loop_manager_class=cme_reward.verl.CMEAgentLoopManager"
                )
            return Request(prompt=prompt, ids=ids, mask=[1] * len(ids))
        row = digest(prompt_ids, ids)
        found = next((note for note in notes if note["row"] == row), None)
        if found is None:
            raise InputError(
                f"a response of {len(ids)} tokens is none of its trajectory's {len(notes)} "
                "outputs: prompt or response were changed after the agent loop"
            )
        context = found["context"]
        return Request(
            prompt=found.get("prompt", prompt),
            ids=[*context, *ids],
            mask=[*found["sampled"], *found["mask"]],
            start=len(context),
            policy_logprobs=found.get("logprobs"),
            validate=found["validate"],
        )

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Any) -> torch.Tensor:
        """`rm_scores [B, T]` of a colocated batch, from each row's `reward_score`.

        Raises:
            InputError: if a row has not one reward for each token of its response.
        """
        responses = data.batch["responses"]
        width = responses.shape[1]
        lengths = data.batch["attention_mask"][:, -width:].sum(dim=1).tolist()
        rm_scores = torch.zeros_like(responses, dtype=torch.float32)
        for row, (length, score) in enumerate(zip(lengths, scores, strict=True)):
            if not hasattr(score, "__len__") or len(score) != length:
                raise InputError(
                    f"response {row} has {length} tokens and reward_score {str(score)[:80]}; "
                    "expected one reward for each token"
                )
            rm_scores[row, :length] = torch.as_tensor(score, dtype=torch.float32)
        return rm_scores


def compute_score(*args: Any, **kwargs: Any) -> float:
    """What `reward.custom_reward_function` names, so that veRL asks `CMEReward`; never called."""
    raise InputError(
        "cme_reward.verl.compute_score is no reward; expected "
        "reward.reward_manager.name=CMEReward, which does not call it"
    )
