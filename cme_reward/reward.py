"""Prompts and sampled ids -> cross-model entropy rewards."""

from __future__ import annotations

import asyncio
import copy
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cme_reward._ragged import Int64, flat_like, require_pairs, split
from cme_reward._together import ALONE as ALONE
from cme_reward._together import timed, together
from cme_reward.assembly import assemble
from cme_reward.batch import CMEBatch
from cme_reward.calls import Answered, Arguments, Call, doubtful, merged, parted, united
from cme_reward.config import CMEConfig
from cme_reward.conversation.messages import Prompt
from cme_reward.conversation.turns import check_environment
from cme_reward.errors import InputError
from cme_reward.generator import Generator
from cme_reward.loading import load_tokenizer
from cme_reward.scoring import MemberScorer, Question, SegmentScores
from cme_reward.spans.table import SpanTable
from cme_reward.verifiers import Ensemble, Verifier, load_verifier
from cme_reward.verifiers.base import Closes, close

Float64 = NDArray[np.float64]


class CrossModelEntropy(Closes):
    """The cross-model entropy reward: how unsurprising a verifier finds a response.

    A generator token's reward is the verifier's log-prob of its text (arXiv 2605.29009, Eq. 1,
    negated), spread over the generator's tokens by character overlap (Appendix B); the sequence
    reward is the mean log-prob per verifier token (Eq. 3). The score is the likelihood of the
    verifier's canonical tokenisation of the text, not a marginal over tokenisations.

    Args:
        verifier: a `Verifier` or `Ensemble`, or the spec of one (see `load_verifier`), which is
            then loaded with its defaults, and closed by `close` or at the end of a `with`.
        generator_tokenizer: the sampler's fast tokenizer, or its name. None: the verifier's own
            (an ensemble's first one's), where responses are texts rather than sampled ids.
        config: see `CMEConfig`.
        eos_token_ids: added tokens, special or not, with which the generator ends a response,
            besides its tokenizer's EOS and what its chat template writes after an assistant
            message.
        generator_template_kwargs: what the generator's prompts were rendered with, such as
            `{"enable_thinking": False}` or `{"chat_template": "..."}`. Whatever its generation
            prompt puts at the start of a response (`<think>`) is shown to the verifier in front of
            it, and not scored, where prompts are messages.
        padded_vocabulary: the generator's model chooses among more ids than its tokenizer has
            (Qwen2.5: 151,936 of 151,665); those beyond write nothing and have no reward. If False,
            they are errors.

    Attributes:
        generator: what is known of the sampler.
        members: a `MemberScorer` for each verifier.
        warns: whether to warn, once each, of responses that do not fit the verifier's context and
            of policy log-probs that are hardly those of what was sampled.

    Raises:
        TokenizerError: if a tokenizer does not load, or is not a fast one.
        ConfigError: if the generator writes markup before its answers, and the configuration does
            not take it apart.
        VerifierError: if a verifier does not load.
    """

    def __init__(
        self,
        verifier: Verifier | Ensemble | str,
        generator_tokenizer: Any = None,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        eos_token_ids: Iterable[int] = (),
        generator_template_kwargs: Mapping[str, Any] | None = None,
        padded_vocabulary: bool = False,
    ) -> None:
        if isinstance(generator_tokenizer, str):  # first: a wrong name shows before weights load
            generator_tokenizer = load_tokenizer(generator_tokenizer)
        self._opened: Verifier | Ensemble | None = None  # what `close` is to close
        if isinstance(verifier, str):
            verifier = self._opened = load_verifier(verifier)
        self.verifier = verifier
        self.config = config
        members = verifier.members if isinstance(verifier, Ensemble) else (verifier,)
        self.members = [MemberScorer(member, config) for member in members]
        self.generator = Generator(
            members[0].tokenizer if generator_tokenizer is None else generator_tokenizer,
            config,
            eos_token_ids=eos_token_ids,
            template_kwargs=generator_template_kwargs,
            padded_vocabulary=padded_vocabulary,
        )
        if generator_tokenizer is not None:  # or texts are scored, which nobody sampled
            self.generator.require_answers()
        self.warns, self._warned = True, set[str]()

    def for_generator(
        self,
        *,
        eos_token_ids: Iterable[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        padded_vocabulary: bool = False,
    ) -> CrossModelEntropy:
        """The same reward, for a generator that also stops at these ids, and whose prompts are
        rendered with these options: what a trainer knows when the reward is made already."""
        other = copy.copy(self)
        other._opened = None  # closed by the first one
        other.generator = self.generator.extended(
            eos_token_ids=eos_token_ids,
            template_kwargs=template_kwargs,
            padded_vocabulary=padded_vocabulary,
        )
        other.generator.require_answers()
        return other

    def __repr__(self) -> str:
        return (
            f"CrossModelEntropy(verifier={self.verifier.name!r}, "
            f"generator={self.generator.name!r}, level={self.config.level!r})"
        )

    def close(self) -> None:
        """Close the verifier if it was opened here, by its spec; harmless twice."""
        close(self._opened)

    @property
    def generator_tokenizer(self) -> Any:
        """The sampler's tokenizer."""
        return self.generator.tokenizer

    @property
    def table(self) -> SpanTable:
        """The spans of the sampler's tokens."""
        return self.generator.table

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
        given = Arguments(prompts, response_ids, response_masks, policy_logprobs)
        ((call, questions),), seconds = timed(self._asked, [given])
        started = time.perf_counter()
        answers = [
            member.verifier.logprobs(*question.arguments)
            for member, question in zip(self.members, questions, strict=True)
        ]
        waited = time.perf_counter() - started
        (batch,), more = timed(self._read, [Answered(call, questions, answers)])
        return self._noted(batch, waited, seconds + more)

    async def score_async(
        self,
        prompts: Sequence[Prompt],
        response_ids: Sequence[Any] | torch.Tensor,
        response_masks: Sequence[Any] | torch.Tensor | None = None,
        policy_logprobs: Sequence[Any] | torch.Tensor | None = None,
    ) -> CMEBatch:
        """The same for coroutines: rollouts are scored while others are still being generated.

        The event loop waits a millisecond or two, where many come at once ten or twenty: long
        responses are read and aligned in threads, shorter ones together. Any number of calls may be
        in progress. Those that wait for a verifier of this process go into its next forward passes
        together; to bound these, make it a `BatchingVerifier`. A cancelled call is not scored if
        the verifier has not begun with it.
        """
        n_tokens = _n_tokens(response_ids)
        given = Arguments(prompts, response_ids, response_masks, policy_logprobs)
        (call, questions), seconds = await together(self._asked, given, n_tokens)
        started = time.perf_counter()
        asking = [
            member.shared.logprobs_async(*question.arguments)
            for member, question in zip(self.members, questions, strict=True)
        ]
        answers = await asyncio.gather(*asking) if len(asking) > 1 else [await asking[0]]
        waited = time.perf_counter() - started
        answered = Answered(call, questions, answers)
        batch, more = await together(self._read, answered, n_tokens)
        return self._noted(batch, waited, seconds + more)

    def score_texts(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        ended: bool | Sequence[bool] | NDArray[np.bool_] = True,
    ) -> CMEBatch:
        """Score B responses given as texts, in the generator tokenizer's own tokens.

        A policy's sampled ids may cut the same text otherwise; for training, score these.

        Args:
            prompts: B strings or message lists, see `__call__`.
            responses: B texts.
            ended: whether the generator ended them, of all or of each: the token that ends a
                response is then put behind them. False for those that were cut off.

        Raises:
            InputError: if lengths disagree.
            TokenizerError: if `ended`, and the generator has no token that ends a response.
        """
        require_pairs(prompts, responses)
        ends = np.asarray(ended, dtype=bool)
        ends = np.full(len(responses), ends) if ends.ndim == 0 else ends
        if len(ends) != len(responses):
            raise InputError(f"ended has {len(ends)} entries for {len(responses)} responses")
        ids = self.table.encode_batch(responses).ids
        closing = [self.generator.end_of_turn] if ends.any() else []
        ended_ids = [[*i.tolist(), *closing * int(e)] for i, e in zip(ids, ends, strict=True)]
        return self(prompts, ended_ids)

    def _asked(self, many: Sequence[Arguments]) -> list[tuple[Call, list[Question]]]:
        """What each of these calls asks each verifier."""
        call = self._prepared(*merged(many))
        questions = [member.ask(call.segments) for member in self.members]
        return parted(call, questions, [len(given.response_ids) for given in many])

    def _read(self, many: Sequence[Answered]) -> list[CMEBatch]:
        """What the answers to each of these calls say."""
        call, questions, answers = united(many)
        scores = [
            member.read(question, given)
            for member, question, given in zip(self.members, questions, answers, strict=True)
        ]
        return self._finished(call, scores, [len(each.call.ids) for each in many])

    def _prepared(
        self, prompts: Sequence[Prompt], response_ids: Any, response_masks: Any, policy: Any
    ) -> Call:
        ids, masks, policy = self._checked(prompts, response_ids, response_masks, policy)
        return Call(ids, self.generator.segments(prompts, ids, masks), policy)

    def _finished(
        self, call: Call, scores: Sequence[SegmentScores], sizes: Sequence[int]
    ) -> list[CMEBatch]:
        return assemble(call.ids, call.segments, scores, call.policy, self.config, sizes)

    def _noted(self, batch: CMEBatch, waited: float, seconds: float) -> CMEBatch:
        batch.metrics["verifier_seconds"] = waited
        batch.metrics["alignment_seconds"] = seconds
        if batch.metrics["truncated"]:
            self._warn(
                "truncated",
                f"{int(batch.metrics['truncated'])} of {len(batch.mask)} responses do not fit the "
                "verifier's context; their tails are masked. The metric `truncated` keeps count",
            )
        return batch

    def _warn(self, about: str, says: str) -> None:
        if self.warns and about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"{says}; this warning is not repeated", stacklevel=4)

    def _checked(
        self, prompts: Sequence[Prompt], response_ids: Any, response_masks: Any, policy: Any
    ) -> tuple[list[Int64], list[NDArray[np.bool_]] | None, Float64 | None]:
        """Rows of ids, rows of masks, flat policy log-probs."""
        require_pairs(prompts, response_ids)
        flat_ids, offsets, sampled = self.generator.responses(response_ids, response_masks)
        check_environment(flat_ids, offsets, sampled)
        masks = None if sampled.all() else split(sampled, offsets)
        if self.config.baseline == "policy":
            if policy is None:
                raise InputError(
                    'baseline="policy" needs policy_logprobs: the log-prob, in nats, that the '
                    "sampler gave each of its tokens"
                )
            policy = flat_like(policy, offsets, "policy_logprobs").astype(np.float64)
            if doubt := doubtful(policy, sampled, offsets):
                self._warn("policy", doubt)
        return split(flat_ids, offsets), masks, policy if self.config.baseline == "policy" else None


def _n_tokens(response_ids: Any) -> int:
    try:
        return sum(map(len, response_ids))
    except TypeError:  # what is wrong with them is said where they are read
        return 0
