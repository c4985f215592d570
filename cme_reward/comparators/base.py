"""What all comparators share: arguments, checks and result are those of `CrossModelEntropy`."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward._ragged import (
    Int64,
    flat_like,
    pad,
    place_of,
    require_pairs,
    row_offsets,
    split,
    sums,
)
from cme_reward.batch import CMEBatch
from cme_reward.comparators.policy import PolicyStatistics
from cme_reward.config import CMEConfig
from cme_reward.conversation.messages import Prompt
from cme_reward.errors import ConfigError, InputError
from cme_reward.generator import Generator
from cme_reward.metrics import length_correlation, mean, repetition, spread
from cme_reward.spans.table import SpanTable

Float64 = NDArray[np.float64]
Rows = Sequence[Any] | torch.Tensor


class Call(NamedTuple):
    """Checked arguments: B responses with N tokens in all, one response after the other."""

    prompts: Sequence[Prompt]
    ids: list[Int64]
    offsets: Int64
    sampled_N: NDArray[np.bool_]
    statistics: dict[str, Float64]
    """The needed fields of `PolicyStatistics`, `[N]`."""

    @property
    def sampled_ids(self) -> list[Int64]:
        """The sampled tokens of each response."""
        masks = split(self.sampled_N, self.offsets)
        return [row[mask] for row, mask in zip(self.ids, masks, strict=True)]

    @property
    def counts(self) -> Int64:
        """How many these are, `[B]`."""
        return np.diff(row_offsets(self.sampled_N.astype(np.int64))[self.offsets])

    def row_sums(self, values_N: Float64) -> NDArray[Any]:
        """The sum of each response's sampled tokens, `[B]`."""
        return sums(np.where(self.sampled_N, values_N, 0), self.offsets)


class Values(NamedTuple):
    """What a comparator finds."""

    sequence_B: Float64
    token_N: Float64 | None = None
    """The parts of it that belong to single tokens, where it has such."""
    metrics: dict[str, float] = {}  # noqa: RUF012 (never changed)


class Comparator:
    """A reward that takes the place of `CrossModelEntropy`: same arguments, same `CMEBatch`.

    Its reward is one number a response, which GRPO gives to every token, as in the papers: `config`
    counts as one of `level="sequence"`. Of the other settings `scale` and `eps` hold, in the
    reward's own unit; those that concern the verifier are read by the rewards that have one.
    All sampled tokens take part, the EOS and white space too.

    Args:
        generator_tokenizer: the sampler's fast tokenizer.
        config: see above. `baseline="policy"` is refused.
        per_token: give each token its own part of the reward instead, where the reward is made of
            such parts; `config` then counts as one of `level="token"`. Not in the papers.
        eos_token_ids: ids with which the generator ends a response, see `CrossModelEntropy`.
    """

    name = ""
    needs: tuple[str, ...] = ()
    """Fields of `PolicyStatistics` that an adapter is to supply."""
    compares_rollouts = False
    """Whether a response's reward depends on the others of its prompt: an adapter is then to hand
    over all of them in one call."""
    has_parts = False

    def __init__(
        self,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        per_token: bool = False,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        if config.baseline != "none":
            raise ConfigError(
                f"baseline={config.baseline!r} is a baseline of cross-model entropy; expected "
                f'baseline="none" with {self.name}'
            )
        if per_token and not self.has_parts:
            raise ConfigError(
                f"per_token=True: {self.name} is a judgement of whole responses, without parts "
                "that belong to tokens; leave per_token out"
            )
        self.generator = Generator(generator_tokenizer, config, eos_token_ids=eos_token_ids)
        self.per_token = per_token
        self.config = replace(config, level="token" if per_token else "sequence")

    def for_generator(self, **known: Any) -> Comparator:
        """The same reward, for what more is known of the generator: see `CrossModelEntropy`."""
        other = copy.copy(self)
        other.generator = self.generator.extended(**known)
        return other

    @property
    def table(self) -> SpanTable:
        """The spans of the sampler's tokens."""
        return self.generator.table

    def __call__(
        self,
        prompts: Sequence[Prompt],
        response_ids: Rows,
        response_masks: Rows | None = None,
        policy_logprobs: Rows | None = None,
        policy_statistics: PolicyStatistics | None = None,
    ) -> CMEBatch:
        """Score B responses.

        Args:
            prompts: B strings or message lists.
            response_ids: the generator's sampled ids, B rows of any length or a `[B, T]` tensor.
            response_masks: the same shape; 1 for sampled tokens, 0 for padding (any integers) and
                for what an environment wrote. None: all sampled, up to the padding at a row's end
                (see `CrossModelEntropy`).
            policy_logprobs: `PolicyStatistics.logprobs`, for adapters that have nothing else.
            policy_statistics: what `needs` names, see `policy_statistics`.

        Returns:
            A `CMEBatch` with T the longest row. No responses give an empty batch.

        Raises:
            InputError: if lengths disagree, a sampled id is outside the vocabulary, or a statistic
                that the reward needs is missing or not finite.
        """
        started = time.perf_counter()
        require_pairs(prompts, response_ids)
        flat, offsets, sampled_N = self.generator.responses(response_ids, response_masks)
        given = policy_statistics or PolicyStatistics()
        if policy_logprobs is not None:
            given = replace(given, logprobs=policy_logprobs)
        call = Call(
            prompts,
            split(flat, offsets),
            offsets,
            sampled_N,
            {name: self._statistic(name, given, offsets, sampled_N) for name in self.needs},
        )
        batch = self._batch(call, self.values(call))
        batch.metrics["reward_seconds"] = time.perf_counter() - started
        return batch

    async def score_async(self, *args: Any, **kwargs: Any) -> CMEBatch:
        """The same for coroutines; the event loop is not blocked."""
        return await asyncio.to_thread(self, *args, **kwargs)

    def values(self, call: Call) -> Values:
        """The rewards of a call; what a comparator is."""
        raise NotImplementedError

    def _statistic(
        self, name: str, given: PolicyStatistics, offsets: Int64, sampled_N: NDArray[np.bool_]
    ) -> Float64:
        rows = getattr(given, name)
        if rows is None:
            raise InputError(
                f"{self.name} needs policy_statistics.{name}: one number, in nats, for each token "
                "of the responses. Compute it with cme_reward.comparators.policy_statistics(model, "
                "prompt_ids, response_ids), or take the framework's own"
            )
        values_N = flat_like(rows, offsets, f"policy_statistics.{name}").astype(np.float64)
        for n in np.flatnonzero(~np.isfinite(values_N) & sampled_N)[:1]:
            b, position = place_of(n, offsets)
            raise InputError(
                f"policy_statistics.{name} of response {b}, token {position} is "
                f"{values_N[n]}; expected a finite number"
            )
        return values_N

    def _batch(self, call: Call, values: Values) -> CMEBatch:
        sequence_B, token_N, more = values
        counts = call.counts
        metrics = {}
        if token_N is not None:
            scored = token_N[call.sampled_N]
            metrics["token_reward_mean"] = mean(scored)
            metrics["token_reward_std"] = spread(scored)
        metrics |= {
            "sequence_reward_mean": mean(sequence_B),
            "truncated": 0.0,
            "repetition": repetition(call.sampled_ids),
            "length_correlation": length_correlation(sequence_B, counts.astype(np.float64)),
            **more,
        }
        if self.per_token:
            assert token_N is not None
            rewards_N = np.where(call.sampled_N, token_N, 0)
        else:
            rewards_N = np.zeros(len(call.sampled_N))
            positions = np.flatnonzero(call.sampled_N)
            last = positions[np.cumsum(counts)[counts > 0] - 1]
            rewards_N[last] = sequence_B[counts > 0]
        rewards, mask, sampled, none = pad(
            call.offsets,
            rewards_N.astype(np.float32),
            call.sampled_N,
            call.sampled_N,
            np.zeros(len(rewards_N), np.float32),
        )
        return CMEBatch(
            token_rewards=rewards,
            mask=mask,
            sampled=sampled,
            sequence_rewards=torch.from_numpy(sequence_B).float(),
            token_logprobs=none,
            dropped_nats=torch.zeros(len(call.ids)),
            verifier_tokens=[(np.zeros(0, np.int64), np.zeros(0)) for _ in call.ids],
            metrics=metrics,
            config=self.config,
        )
