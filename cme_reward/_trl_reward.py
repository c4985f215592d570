"""Cross-model entropy as an entry of TRL's `reward_funcs`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from cme_reward._pieces import special_ids
from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.errors import ConfigError, InputError
from cme_reward.loading import load_tokenizer
from cme_reward.reward import CrossModelEntropy
from cme_reward.verifiers import Ensemble, Verifier, load_verifier


def cme_reward_func(
    verifier: Verifier | Ensemble | str,
    tokenizer: Any,
    config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
    *,
    eos_token_ids: Iterable[int] | None = None,
) -> RewardFunction:
    """Cross-model entropy as an entry of TRL's `reward_funcs`.

    Args:
        verifier: a verifier, or the spec of one (see `load_verifier`), which is then loaded on this
            process's own device.
        tokenizer: the policy's fast tokenizer, or its name.
        config: see `CMEConfig`. `level="token"` needs `CMEGRPOTrainer`; `level="sequence"` works
            with the stock `GRPOTrainer` too.
        eos_token_ids: see `CrossModelEntropy`. `CMEGRPOTrainer` adds the ids at which TRL stops.
    """
    if isinstance(verifier, str):
        rank = os.environ.get("LOCAL_RANK")
        own_gpu = rank is not None and torch.cuda.is_available()
        verifier = load_verifier(verifier, **({"device": f"cuda:{rank}"} if own_gpu else {}))
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    scorer = CrossModelEntropy(verifier, tokenizer, config, eos_token_ids=eos_token_ids)
    return RewardFunction(scorer)


class RewardFunction:
    """A scorer with the interface of `CrossModelEntropy`, as an entry of `reward_funcs`.

    Called by the stock `GRPOTrainer`, it returns the sequence rewards (arXiv 2605.29009, Eq. 3) in
    nats, from the sampled `completion_ids`, and logs its metrics as `cme/...`.

    Args:
        scorer: called with `(prompts, response_ids, response_masks, policy_logprobs)`, returns a
            `CMEBatch`; has a `CMEConfig` as `config`.
        name: under which TRL logs the reward.
    """

    def __init__(self, scorer: Any, name: str = "cme") -> None:
        self.scorer = scorer
        self.__name__ = name

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
    policy: Sequence[Any] | None = None,
) -> CMEBatch:
    """The scorer's rewards, also where a model sampled an id that its tokenizer does not have.

    Models pad their vocabulary (Qwen2.5 to 151,936 of 151,665), and a run should not end when one
    of those ids is drawn: it has no text and is not scored.
    """
    table = getattr(scorer, "table", None)
    if table is not None and any(max(row, default=0) >= table.vocab_size for row in ids):
        known = [np.asarray(row) < table.vocab_size for row in ids]
        blank = special_ids(table.tokenizer)[0]
        ids = [np.where(k, row, blank).tolist() for k, row in zip(known, ids, strict=True)]
        given = known if masks is None else masks
        masks = [np.logical_and(_host(m), k) for m, k in zip(given, known, strict=True)]
    return scorer(prompts, ids, masks, policy)


def _host(mask: Any) -> Any:
    return mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)


def _has_other_roles(completion: Any) -> bool:
    return not isinstance(completion, str) and any(m["role"] != "assistant" for m in completion)
