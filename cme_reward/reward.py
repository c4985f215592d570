"""Prompts and sampled ids -> cross-model entropy rewards."""

from __future__ import annotations

import asyncio
import copy
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward._ragged import Int64, split
from cme_reward._rows import check_environment, flat_like, flat_responses
from cme_reward.assembly import assemble
from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.conversation.environment import EnvironmentReader
from cme_reward.conversation.format import Prompt, end_ids
from cme_reward.conversation.turns import Segment, Thinking, split_turns
from cme_reward.errors import InputError
from cme_reward.scoring import MemberScorer, SegmentScores, without_blocking
from cme_reward.spans.pieces import special_ids
from cme_reward.spans.table import SpanTable
from cme_reward.verifiers.base import Verifier
from cme_reward.verifiers.ensemble import Ensemble

Float64 = NDArray[np.float64]


class _Call(NamedTuple):
    """Checked arguments of one call, cut into assistant turns."""

    ids: list[Int64]
    segments: list[Segment]
    policy: Float64 | None
    seconds: float
    """Spent on it so far."""


class CrossModelEntropy:
    """The cross-model entropy reward: how unsurprising a verifier finds a response.

    A generator token's reward is the verifier's log-prob of its text (arXiv 2605.29009, Eq. 1,
    negated), spread over the generator's tokens by character overlap (Appendix B); the sequence
    reward is the mean log-prob per verifier token (Eq. 3). The score is the likelihood of the
    verifier's canonical tokenisation of the text, not a marginal over tokenisations.

    Args:
        verifier: a `Verifier` or `Ensemble`, see `load_verifier`.
        generator_tokenizer: the sampler's fast tokenizer.
        config: see `CMEConfig`.
        eos_token_ids: special tokens with which the generator ends a response, besides its
            tokenizer's EOS and the token that its chat template writes after an assistant message.
        generator_template_kwargs: what the generator's prompts were rendered with, such as
            `{"enable_thinking": False}` or `{"chat_template": "..."}`. Whatever its generation
            prompt puts at the start of a response (`<think>`) is shown to the verifier in front of
            it, and not scored, where prompts are messages.

    Raises:
        TokenizerError: if a tokenizer is not a fast one.
    """

    def __init__(
        self,
        verifier: Verifier | Ensemble,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        eos_token_ids: Iterable[int] = (),
        generator_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.verifier = verifier
        self.generator_tokenizer = generator_tokenizer
        self.config = config
        members = verifier.members if isinstance(verifier, Ensemble) else (verifier,)
        self.members = [MemberScorer(member, config) for member in members]
        self._warned = False
        self._know_generator(eos_token_ids, generator_template_kwargs)

    def for_generator(
        self, *, eos_token_ids: Iterable[int] = (), template_kwargs: Mapping[str, Any] | None = None
    ) -> CrossModelEntropy:
        """The same reward, for a generator that also stops at these ids, and whose prompts are
        rendered with these options: what a trainer knows when the reward is made already."""
        other = copy.copy(self)
        given = {**self.reader.template_kwargs, **(template_kwargs or {})}
        other._know_generator([*self.eos_ids.tolist(), *eos_token_ids], given)
        return other

    def _know_generator(
        self, eos_token_ids: Iterable[int], template_kwargs: Mapping[str, Any] | None
    ) -> None:
        tokenizer, config = self.generator_tokenizer, self.config
        self.special_ids = special_ids(tokenizer)
        self.eos_ids = end_ids(tokenizer, eos_token_ids)
        shown = config.special_tokens == "show"
        self.table = SpanTable(tokenizer, self._inner_specials() if shown else ())
        opening, closing = config.thinking_tags
        self.reader = EnvironmentReader(
            tokenizer, template_kwargs, (opening, closing), show_special=shown
        )
        self._thinking = Thinking(config.thinking, (opening, closing), self._tag_ids())

    def _inner_specials(self) -> list[int]:
        """Special tokens that can stand inside a response."""
        tokenizer = self.generator_tokenizer
        outer = {getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "unk")}
        return [int(i) for i in np.setdiff1d(self.special_ids, self.eos_ids) if i not in outer]

    def _tag_ids(self) -> dict[int, bool]:
        """Special tokens that open (True) and close thoughts, where their text is left out."""
        if self.config.special_tokens == "show":
            return {}
        names = self.generator_tokenizer.convert_ids_to_tokens(self.special_ids.tolist())
        opening, closing = self.config.thinking_tags
        named = dict(zip(names, self.special_ids.tolist(), strict=True))
        return {named[tag]: tag == opening for tag in (opening, closing) if tag in named}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        response_ids: Sequence[Any] | torch.Tensor,
        response_masks: Sequence[Any] | torch.Tensor | None = None,
        policy_logprobs: Sequence[Any] | torch.Tensor | None = None,
    ) -> CMEBatch:
        """Score B responses.

        Args:
            prompts: B strings or message lists. To a chat verifier, a string is one user message.
            response_ids: the generator's sampled ids, B rows of any length or a `[B, T]` tensor.
            response_masks: the same shape; 1 for sampled tokens, 0 for padding (any integers) and
                for what an environment wrote between them (conditioned on, never scored). None, or
                None for a row: all sampled, up to the first end (EOS) among the special tokens at
                its end, which padding may follow; without an end, up to its padding tokens.
            policy_logprobs: the same shape; the sampler's own log-probs in nats, for
                `baseline="policy"`.

        Returns:
            A `CMEBatch` with T the longest row. No responses give an empty batch. A response of
            which the verifier scores nothing (empty and cut off, or a prompt that fills the
            context) has sequence reward `log(1 / vocabulary)`: as surprising as a uniform guess.

        Raises:
            InputError: if lengths disagree or an id that is read is outside the vocabulary.
            VerifierError: if the verifier returns anything but finite log-probs.
        """
        call = self._prepared(prompts, response_ids, response_masks, policy_logprobs)
        scores = [member.score(call.segments) for member in self.members]
        return self._finished(call, scores)

    async def score_async(
        self,
        prompts: Sequence[Prompt],
        response_ids: Sequence[Any] | torch.Tensor,
        response_masks: Sequence[Any] | torch.Tensor | None = None,
        policy_logprobs: Sequence[Any] | torch.Tensor | None = None,
    ) -> CMEBatch:
        """The same for coroutines: rollouts are scored while others are still being generated.

        The event loop waits a millisecond or two at most: longer responses are read and aligned in
        threads. Any number of calls may be in progress. Those that wait for a verifier of this
        process go into its next forward passes together; to bound these, make the verifier a
        `BatchingVerifier`. A cancelled call is not scored if the verifier has not begun with it.
        """
        n_tokens = _n_tokens(response_ids)
        call = await without_blocking(
            n_tokens, self._prepared, prompts, response_ids, response_masks, policy_logprobs
        )
        scores = await asyncio.gather(
            *(member.score_async(call.segments) for member in self.members)
        )
        return await without_blocking(n_tokens, self._finished, call, scores)

    def _prepared(
        self, prompts: Sequence[Prompt], response_ids: Any, response_masks: Any, policy: Any
    ) -> _Call:
        started = time.perf_counter()
        ids, masks, policy = self._checked(prompts, response_ids, response_masks, policy)
        segments = split_turns(
            prompts, ids, masks, self.table, self.reader, self.eos_ids, self._thinking
        )
        return _Call(ids, segments, policy, time.perf_counter() - started)

    def _finished(self, call: _Call, scores: Sequence[SegmentScores]) -> CMEBatch:
        started = time.perf_counter()
        batch = assemble(call.ids, call.segments, scores, call.policy, self.config)
        own = call.seconds + sum(score.own_seconds for score in scores)
        batch.metrics["verifier_seconds"] = sum(score.verifier_seconds for score in scores)
        batch.metrics["alignment_seconds"] = own + time.perf_counter() - started
        if batch.metrics["truncated"] and not self._warned:
            self._warned = True
            warnings.warn(
                f"{int(batch.metrics['truncated'])} of {len(call.ids)} responses do not fit the "
                "verifier's context; their tails are masked. The metric `truncated` keeps count, "
                "this warning is not repeated",
                stacklevel=3,
            )
        return batch

    def _checked(
        self, prompts: Sequence[Prompt], response_ids: Any, response_masks: Any, policy: Any
    ) -> tuple[list[Int64], list[NDArray[np.bool_]] | None, Float64 | None]:
        """Rows of ids, rows of masks, flat policy log-probs."""
        if isinstance(prompts, str) or len(prompts) != len(response_ids):
            raise InputError(
                f"got {len(prompts)} prompts and {len(response_ids)} responses; expected one "
                "prompt, a string or a list of messages, for each response"
            )
        flat_ids, offsets, sampled = flat_responses(
            response_ids, response_masks, self.table, self.special_ids, self.eos_ids
        )
        check_environment(flat_ids, offsets, sampled)
        masks = None if sampled.all() else split(sampled, offsets)
        if self.config.baseline == "policy":
            if policy is None:
                raise InputError(
                    'baseline="policy" needs policy_logprobs: the log-prob, in nats, that the '
                    "sampler gave each of its tokens"
                )
            policy = flat_like(policy, offsets, "policy_logprobs").astype(np.float64)
        return split(flat_ids, offsets), masks, policy if self.config.baseline == "policy" else None


def _n_tokens(response_ids: Any) -> int:
    try:
        return sum(map(len, response_ids))
    except TypeError:  # what is wrong with them is said where they are read
        return 0
