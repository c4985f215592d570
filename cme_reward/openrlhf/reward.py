"""Cross-model entropy as OpenRLHF's `reward_func`: one number per response, from text."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from cme_reward.conversation.rendered import RenderedReader
from cme_reward.errors import ConfigError
from cme_reward.loading import load_tokenizer
from cme_reward.openrlhf.score import in_unit_interval, make_scorer, metrics_of, prompt_of
from cme_reward.openrlhf.settings import load_settings
from cme_reward.openrlhf.verifier import open_verifier

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_made: list[tuple[Any, RenderedReader]] = []


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
) -> dict[str, Any]:
    """Sequence-level cross-model entropy (arXiv 2605.29009, Eq. 3) of responses given as text.

    Args:
        queries: decoded ids of prompt and response, special tokens included.
        prompts: the rendered prompts.
        labels: messages of the prompts (a list, or JSON); anything else is not used.

    Returns:
        `rewards`, `[B]` in nats, `scores`, `[B]`: `exp(rewards)` inside (0, 1), and `extra_logs`,
        the metrics as `[B]`.

    Raises:
        ConfigError: for settings that need more than text.
        InputError: if a prompt cannot be read back into messages.
    """
    try:
        return _reward(list(queries), list(prompts), list(labels))
    except Exception:
        # OpenRLHF logs the error at INFO, goes on without a reward and fails later, elsewhere.
        _log.exception("the reward function failed; training cannot go on without a reward")
        raise


def _reward(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    scorer, reader = _scorer()
    messages = [prompt_of(reader, *pair) for pair in zip(prompts, labels, strict=True)]
    texts = [reader.response(*pair) for pair in zip(queries, prompts, strict=True)]
    batch = scorer(messages, reader.ids_batch(texts))
    scores = [in_unit_interval(x) for x in batch.sequence_rewards.tolist()]
    return {
        "rewards": batch.sequence_rewards,
        "scores": torch.tensor(scores, dtype=torch.float32),
        "extra_logs": {
            name: torch.full((len(queries),), value) for name, value in metrics_of(batch).items()
        },
    }


def _scorer() -> tuple[Any, RenderedReader]:
    """Made once per process; OpenRLHF calls from many threads."""
    with _lock:
        if not _made:
            settings = load_settings(level="sequence")
            for name, value in (("level", "token"), ("baseline", "policy")):
                if getattr(settings.config, name) == value:
                    raise ConfigError(
                        f"{name}={value!r} needs the sampled ids, which OpenRLHF shows to agents "
                        "only: train with --train.agent_func_path (see docs/openrlhf.md), or leave "
                        f"{name} out"
                    )
            if settings.samples:
                raise ConfigError(
                    f"samples={settings.samples} is for the trainer with per-token rewards: a "
                    "reward function knows neither the step nor the log; leave CME_SAMPLES out"
                )
            if settings.generator_tokenizer is None:
                raise ConfigError(
                    "the policy's tokenizer is not known: set CME_GENERATOR_TOKENIZER to what "
                    "--actor.model_name_or_path says. reward_func is handed text, with the "
                    "policy's chat template and special tokens in it"
                )
            tokenizer = load_tokenizer(settings.generator_tokenizer)
            scorer = make_scorer(settings, open_verifier(settings), tokenizer)
            _made.append((scorer, RenderedReader(tokenizer)))
        return _made[0]
