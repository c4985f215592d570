"""Finished rollouts of OpenRLHF -> their cross-model entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.conversation.messages import Prompt
from cme_reward.conversation.rendered import RenderedReader, messages_from_label
from cme_reward.errors import ConfigError
from cme_reward.metrics import names
from cme_reward.openrlhf.checks import KEY, LOGPROBS
from cme_reward.openrlhf.settings import Settings
from cme_reward.reward import CrossModelEntropy

_NEAREST = 1e-6
_LOGGED = (*names("tokens", "mean", "sum"), "verifier_seconds", "alignment_seconds")


def make_scorer(settings: Settings, verifier: Any, tokenizer: Any) -> CrossModelEntropy:
    """The reward for a policy with this tokenizer, which ends where vLLM stops it."""
    stops = _stop_ids(tokenizer.name_or_path)
    return CrossModelEntropy(
        verifier, tokenizer, settings.config, eos_token_ids=stops, padded_vocabulary=True
    )


def prompt_of(reader: RenderedReader, rendered: str, label: Any) -> Prompt:
    """The messages a label carries, or else those of which `rendered` was made.

    Raises:
        InputError: if there are none, and the prompt cannot be read back.
    """
    messages = messages_from_label(label)
    return reader.prompt(rendered) if messages is None else messages


def shown(tokenizer: Any, prompt: str, seen: Sequence[int]) -> str:
    """The rendered prompt the policy saw, as ids: an environment's `reset` may have written another
    than `prompt`."""
    whole = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
    # Over-long prompts were cut on the left; the verifier reads them whole.
    if not seen or whole[-len(seen) :] == list(seen):
        return prompt
    return tokenizer.decode(seen, skip_special_tokens=False)


def in_unit_interval(sequence_reward: float) -> float:
    """`exp` of a mean log-prob, inside (0, 1): dynamic filtering drops what is not."""
    return min(max(math.exp(min(sequence_reward, 0.0)), _NEAREST), 1 - _NEAREST)


def metrics_of(batch: CMEBatch) -> dict[str, float]:
    """The metrics that mean something for a single response, as OpenRLHF averages them."""
    sequence = float(batch.sequence_rewards.mean()) if len(batch.sequence_rewards) else 0.0
    kept = {f"cme/{name}": float(batch.metrics[name]) for name in _LOGGED}
    return {"cme/sequence_reward": sequence, **kept}


class Actions(NamedTuple):
    """A rollout's response: all from its first sampled token to its last."""

    start: int
    """Where it is in the rollout."""
    ids: list[int]
    sampled: list[bool]
    policy: list[float] | None
    """The policy's log-probs."""
    joints: list[int]
    """Where a turn follows another at once: the environment had nothing to say."""


def actions_of(output: Mapping[str, Any], max_length: int) -> Actions:
    """OpenRLHF cuts everything at `max_length`, and so does this."""
    ids = [int(i) for i in output["observation_tokens"]][:max_length]
    ranges = [(int(i), min(int(j), len(ids))) for i, j in output["action_ranges"]]
    ranges = [(i, j) for i, j in ranges if i < j]
    start, stop = (ranges[0][0], ranges[-1][1]) if ranges else (len(ids), len(ids))
    sampled = [False] * (stop - start)
    for i, j in ranges:
        sampled[i - start : j - start] = [True] * (j - i)
    policy = output.get("rollout_log_probs")
    return Actions(
        start,
        ids[start:stop],
        sampled,
        None if policy is None else list(policy[start:stop]),
        [i - start for (_, j), (i, _) in pairwise(ranges) if i == j],
    )


async def score_rollout(
    scorer: CrossModelEntropy,
    prompt: Prompt,
    output: dict[str, Any],
    max_length: int,
    environment_weight: float,
    *,
    samples: bool = False,
) -> dict[str, Any]:
    """An executor's output with cross-model entropy as its reward, token by token.

    Where `samples` are kept, what they show is carried beside it.

    Raises:
        ConfigError: for `baseline="policy"` where OpenRLHF does not keep the policy's log-probs.
    """
    start, ids, sampled, policy, joints = actions_of(output, max_length)
    if scorer.config.baseline != "policy":
        policy = None
    elif policy is None:
        raise ConfigError(
            'baseline="policy" needs the log-probs that the policy sampled with; OpenRLHF keeps '
            "them with --algo.advantage.is_correction_level token (or seq), "
            "--algo.advantage.is_correction_enable or --enable_vllm_is_correction, by version"
        )
    # Between two such turns an end that nobody sampled tells that the first one is over.
    at = [k for k in joints if ids[k - 1] in scorer.generator.eos_ids]
    own = np.insert(np.ones(len(ids), dtype=bool), at, False)
    eos = scorer.generator_tokenizer.eos_token_id
    ends = [ids[k - 1] if eos is None else eos for k in at]
    batch = await scorer.score_async(
        [prompt],
        [np.insert(np.array(ids, dtype=np.int64), at, ends)],
        [np.insert(np.array(sampled, dtype=bool), at, False)],
        None if policy is None else [np.insert(np.array(policy, dtype=float), at, 0.0)],
    )
    sequence = float(batch.sequence_rewards[0])
    bonus = environment_weight * float(output.get("reward") or 0.0)
    rewards, scored = batch.token_rewards[0].double().numpy()[own], batch.mask[0].numpy()[own]
    add_to_response(rewards, scored, bonus, scorer.config)
    length = min(len(output["observation_tokens"]), max_length)

    def of_actions(values: NDArray[np.float64]) -> list[float]:
        """On the axis of actions: entry a is about token a + 1."""
        row = np.full(length, np.nan)
        row[start : start + len(ids)] = values
        return row[1:].tolist()

    logs = dict(output.get("extra_logs") or {}) | metrics_of(batch)
    logs[KEY] = of_actions(np.where(scored, rewards, np.nan))
    if samples:
        logs[LOGPROBS] = of_actions(batch.token_logprobs[0].double().numpy()[own])
    output["reward"] = sequence + bonus
    output["scores"] = in_unit_interval(sequence)
    output["extra_logs"] = logs
    return output


def add_to_response(rewards_T: Any, scored_T: Any, amount: Any, config: CMEConfig) -> None:
    """Add what belongs to a whole response to its token rewards, in place.

    To each of them, since that is what one number per response does in GRPO. Where tokens are
    credited with what follows, to the last one that has a reward: each then has it once.
    """
    if config.credit == "return" and scored_T.any():
        rewards_T[int(np.flatnonzero(scored_T)[-1])] += amount
    else:
        rewards_T += amount


def _stop_ids(name: str) -> list[int]:
    """Where vLLM stops besides the tokenizer's EOS: as the model's generation config says."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(name, local_files_only=True).eos_token_id
    except OSError:  # a model need not have one; and where it was loaded, it is here
        return []
    return [] if found is None else np.atleast_1d(found).tolist()
