"""Cross-model entropy, or a reward to compare it with, as an entry of TRL's `reward_funcs`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cme_reward.batch import CMEBatch
from cme_reward.comparators import (
    PolicyStatistics,
    call_reward,
    load_reward,
    needed_statistics,
)
from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError, InputError
from cme_reward.verifiers import Ensemble, Verifier


def cme_reward_func(
    verifier: Verifier | Ensemble | str | None,
    tokenizer: Any,
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
    *,
    eos_token_ids: Iterable[int] = (),
    reward: str = "cme",
    samples: int = 0,
    **options: Any,
) -> RewardFunction:
    """Cross-model entropy as an entry of TRL's `reward_funcs`, or a reward to compare it with.

    Args:
        verifier: a verifier, or the spec of one (see `load_verifier`), which is then loaded on this
            process's own device. Rewards without a verifier leave it alone.
        tokenizer: the policy's fast tokenizer, or its name.
        config: see `CMEConfig`. `level="token"` needs `CMEGRPOTrainer`; `level="sequence"` works
            with the stock `GRPOTrainer` too.
        eos_token_ids: see `CrossModelEntropy`. `CMEGRPOTrainer` adds the ids at which TRL stops.
        reward: a name in `cme_reward.comparators.REWARDS`; TRL logs under it.
        samples: how many responses of a step `CMEGRPOTrainer` keeps in its output folder, for the
            heat maps of `cme-reward report`: of every step at first, then of ever fewer.
        options: those of the reward, see `load_reward`.
    """
    rank = os.environ.get("LOCAL_RANK")
    own_gpu = rank is not None and torch.cuda.is_available()
    scorer = load_reward(
        reward,
        tokenizer,
        config,
        verifier=verifier,
        eos_token_ids=eos_token_ids,
        device=f"cuda:{rank}" if own_gpu else None,
        **options,
    )
    return RewardFunction(scorer, name=reward, samples=samples)


class RewardFunction:
    """A scorer with the interface of `CrossModelEntropy`, as an entry of `reward_funcs`.

    Called by the stock `GRPOTrainer`, it returns the sequence rewards (arXiv 2605.29009, Eq. 3) in
    nats, from the sampled `completion_ids`, and logs its metrics as `cme/...`.

    Args:
        scorer: called with `(prompts, response_ids, response_masks, policy_logprobs)`, returns a
            `CMEBatch`; has a `CMEConfig` as `config`. Or a `Comparator`.
        name: under which TRL logs the reward.
        samples: see `cme_reward_func`.
    """

    def __init__(self, scorer: Any, name: str = "cme", samples: int = 0) -> None:
        if samples < 0:
            raise ConfigError(f"samples is {samples}; expected how many responses to keep, or 0")
        # Models pad their vocabulary, and a run should not end when an id from there is drawn.
        known = getattr(scorer, "for_generator", None)
        self.scorer = scorer if known is None else known(padded_vocabulary=True)
        self.__name__ = name
        self.samples = samples

    def __call__(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        completions: Sequence[Any] = (),
        log_metric: Any = None,
        response_mask: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One reward per completion; TRL's arguments.

        `response_mask` is a column that a `rollout_func` may return: 1 for sampled tokens, 0 for
        what an environment wrote.

        Raises:
            ConfigError: for a configuration that needs `CMEGRPOTrainer`.
            InputError: if a completion has several turns and no mask says which tokens were
                sampled.
        """
        for setting, value in (("level", "token"), ("baseline", "policy")):
            if getattr(self.scorer.config, setting) == value:
                raise ConfigError(
                    f'CMEConfig({setting}="{value}") needs CMEGRPOTrainer: the stock GRPOTrainer '
                    "hands over no policy log-probs and takes one number per completion. Train "
                    'with cme_reward.trl.CMEGRPOTrainer, or set level="sequence" and '
                    'baseline="none"'
                )
        if needed_statistics(self.scorer):
            raise ConfigError(
                f"the reward {self.__name__!r} is made of the policy's next-token distributions, "
                "which the stock GRPOTrainer does not hand to reward functions; train with "
                "cme_reward.trl.CMEGRPOTrainer"
            )
        if self.samples:
            raise ConfigError(
                f"samples={self.samples} needs CMEGRPOTrainer: the stock GRPOTrainer tells reward "
                "functions neither the output folder nor the step; leave samples at 0"
            )
        if response_mask is None and any(map(_has_other_roles, completions)):
            raise InputError(
                "a completion holds tool output, and the stock GRPOTrainer does not tell reward "
                "functions which tokens were sampled; train with cme_reward.trl.CMEGRPOTrainer"
            )
        batch = score(self.scorer, prompts, completion_ids, response_mask)
        if log_metric is not None:
            for name, value in batch.metrics.items():
                log_metric(f"{self.__name__}/{name}", value)
        return batch.sequence_rewards.tolist()


def score(
    scorer: Any,
    prompts: Sequence[Any],
    ids: Sequence[Sequence[int]],
    masks: Sequence[Any] | None,
    statistics: PolicyStatistics | None = None,
) -> CMEBatch:
    """The scorer's rewards. One that compares the rollouts of a prompt is shown those of all
    processes."""
    if not getattr(scorer, "compares_rollouts", False):
        return call_reward(scorer, prompts, ids, masks, statistics)
    masks = [[True] * len(row) for row in ids] if masks is None else [_host(m) for m in masks]
    before, everything = _gathered(list(zip(prompts, map(list, ids), masks, strict=True)))
    all_prompts, all_ids, all_masks = zip(*everything, strict=True)
    batch = call_reward(scorer, all_prompts, all_ids, all_masks)
    return _rows_of(batch, slice(before, before + len(ids)))


def _gathered(rows: list[Any]) -> tuple[int, list[Any]]:
    """The rows of all processes, and how many of them come before this one's."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    of_processes = gather_object([rows])
    before = of_processes[: PartialState().process_index]
    return sum(map(len, before)), [row for some in of_processes for row in some]


def _rows_of(batch: CMEBatch, rows: slice) -> CMEBatch:
    return replace(
        batch,
        token_rewards=batch.token_rewards[rows],
        mask=batch.mask[rows],
        sampled=batch.sampled[rows],
        sequence_rewards=batch.sequence_rewards[rows],
        token_logprobs=batch.token_logprobs[rows],
        dropped_nats=batch.dropped_nats[rows],
        verifier_tokens=batch.verifier_tokens[rows],
    )


def _host(mask: Any) -> Any:
    return mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)


def _has_other_roles(completion: Any) -> bool:
    return not isinstance(completion, str) and any(m["role"] != "assistant" for m in completion)
