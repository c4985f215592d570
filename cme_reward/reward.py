"""Prompts and sampled ids -> cross-model entropy rewards."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cme_reward._pieces import special_ids
from cme_reward._ragged import Int64, flatten_ids, row_offsets, split
from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.errors import InputError
from cme_reward.metrics import length_correlation, repetition
from cme_reward.prompts import EnvironmentReader, Prompt, PromptFormat
from cme_reward.scoring import MemberScorer, SegmentScores
from cme_reward.segments import Segment, split_turns
from cme_reward.spans import BLANK, TEXT, SpanTable
from cme_reward.verifiers.base import Verifier
from cme_reward.verifiers.ensemble import Ensemble

Float64 = NDArray[np.float64]


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
        eos_token_ids: ids with which the generator ends a response. Default: its tokenizer's EOS
            and the token its chat template writes after an assistant message.

    Raises:
        TokenizerError: if a tokenizer is not a fast one.
    """

    def __init__(
        self,
        verifier: Verifier | Ensemble,
        generator_tokenizer: Any,
        config: CMEConfig = CMEConfig(),  # noqa: B008 (frozen)
        *,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        self.verifier = verifier
        self.generator_tokenizer = generator_tokenizer
        self.config = config
        self.table = SpanTable(generator_tokenizer)
        members = verifier.members if isinstance(verifier, Ensemble) else (verifier,)
        self.members = [MemberScorer(member, config) for member in members]
        self.reader = EnvironmentReader(generator_tokenizer)
        if eos_token_ids is None:
            ends = (generator_tokenizer.eos_token_id, PromptFormat(generator_tokenizer).end_of_turn)
            eos_token_ids = {end for end in ends if end is not None}
        self.eos_ids = np.intersect1d(
            np.fromiter(eos_token_ids, dtype=np.int64), special_ids(generator_tokenizer)
        )
        self._warned = False

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
            response_masks: the same shape; 1 for sampled tokens, 0 for padding and for what an
                environment wrote between them (conditioned on, never scored). None: all sampled.
            policy_logprobs: the same shape; the sampler's own log-probs in nats, for
                `baseline="policy"`.

        Returns:
            A `CMEBatch` with T the longest row. No responses give an empty batch. A response of
            which the verifier scores nothing (empty and cut off, or a prompt that fills the
            context) has sequence reward `log(1 / vocabulary)`: as surprising as a uniform guess.

        Raises:
            InputError: if lengths disagree or an id is outside the vocabulary.
            VerifierError: if the verifier returns anything but finite log-probs.
        """
        started = time.perf_counter()
        ids, masks, policy = self._checked(prompts, response_ids, response_masks, policy_logprobs)
        segments = split_turns(prompts, ids, masks, self.table, self.reader, self.eos_ids)
        scores = [member.score(segments) for member in self.members]
        batch = self._assemble(ids, segments, scores, policy)
        elapsed = time.perf_counter() - started
        verifier_seconds = sum(score.seconds for score in scores)
        batch.metrics["verifier_seconds"] = verifier_seconds
        batch.metrics["alignment_seconds"] = elapsed - verifier_seconds
        if batch.metrics["truncated"] and not self._warned:
            self._warned = True
            warnings.warn(
                f"{int(batch.metrics['truncated'])} of {len(ids)} responses do not fit the "
                "verifier's context; their tails are masked. The metric `truncated` keeps count, "
                "this warning is not repeated",
                stacklevel=2,
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
        flat_ids, offsets = flatten_ids(_on_host(response_ids), self.table.vocab_size, "response")
        masks = None
        if response_masks is not None:
            masks = split(_like(response_masks, offsets, "response_masks").astype(bool), offsets)
        if self.config.baseline == "policy":
            if policy is None:
                raise InputError(
                    'baseline="policy" needs policy_logprobs: the log-prob, in nats, that the '
                    "sampler gave each of its tokens"
                )
            policy = _like(policy, offsets, "policy_logprobs").astype(np.float64)
        return split(flat_ids, offsets), masks, policy if self.config.baseline == "policy" else None

    def _assemble(
        self,
        ids: list[Int64],
        segments: list[Segment],
        scores: list[SegmentScores],
        policy: Float64 | None,
    ) -> CMEBatch:
        offsets = row_offsets([len(row) for row in ids])
        n_rows, n_tokens = len(ids), int(offsets[-1])
        row_of_token = np.repeat(np.arange(n_rows), np.diff(offsets))
        row_of_segment = np.array([s.row for s in segments], dtype=np.int64)
        sampled = np.zeros(n_tokens, dtype=bool)
        for s in segments:
            sampled[offsets[s.row] + s.start : offsets[s.row] + s.stop] = True
        kinds = np.concatenate([np.zeros(0, np.uint8), *(s.kinds for s in segments)])

        def per_row(values: ArrayLike, rows: NDArray[Any]) -> NDArray[Any]:
            return np.bincount(rows, np.asarray(values, dtype=np.float64), n_rows)

        # Segments hold the sampled tokens in order, so that flat arrays of both correspond.
        logprobs = np.zeros(n_tokens)
        logprobs[sampled] = np.mean([score.aligned_N for score in scores], axis=0)
        with_text = (kinds == TEXT) | ((kinds == BLANK) & (self.config.whitespace == "keep"))
        covered = np.all([score.covered_N for score in scores], axis=0)
        is_eos = np.all([score.is_eos_N for score in scores], axis=0)
        scored = sampled.copy()
        scored[sampled] = (with_text & covered) | is_eos
        own = np.zeros(n_tokens) if policy is None else np.where(scored, policy, 0)
        self._check_policy(own, offsets)
        rewards = np.where(scored, logprobs - own, 0)

        sequence, total = np.zeros(n_rows), np.zeros(n_rows)
        own_sum = per_row(own, row_of_token)
        for score in scores:
            sums = per_row(score.sums_n, row_of_segment)
            counts = per_row(score.counts_n, row_of_segment)
            means = (sums - own_sum) / np.maximum(counts, 1)
            sequence += np.where(counts > 0, means, score.uniform) / len(scores)
            total += sums / len(scores)
        # Floored at 0: a sum of a few thousand aligned log-probs ends some 1e-12 off.
        kept = per_row(np.where(scored, logprobs, 0), row_of_token)
        dropped = np.maximum(kept - total, 0)

        truncated = np.any([score.truncated_n for score in scores], axis=0)
        n_verifier_tokens = np.mean([score.counts_n.sum() for score in scores])
        metrics = {
            "token_reward_mean": _mean(rewards[scored]),
            "token_reward_std": float(rewards[scored].std(ddof=1)) if scored.sum() > 1 else 0.0,
            "sequence_reward_mean": _mean(sequence),
            "coverage": _mean(covered[with_text], empty=1.0),
            "dropped_nats": _mean(dropped),
            "verifier_tokens_per_token": float(n_verifier_tokens / max(sampled.sum(), 1)),
            "truncated": float(len(np.unique(row_of_segment[truncated]))),
            "repetition": repetition(split(*_sampled_rows(ids, sampled, offsets))),
            "length_correlation": length_correlation(sequence, per_row(sampled, row_of_token)),
        }
        if self.config.level == "sequence":
            rewards, scored = np.zeros(n_tokens), sampled
            last = {s.row: int(offsets[s.row]) + s.stop - 1 for s in segments if s.stop > s.start}
            for b, position in last.items():
                rewards[position] = sequence[b]
        return CMEBatch(
            token_rewards=_pad(rewards.astype(np.float32), offsets),
            mask=_pad(scored, offsets),
            sequence_rewards=torch.from_numpy(sequence).float(),
            token_logprobs=_pad(logprobs.astype(np.float32), offsets),
            dropped_nats=torch.from_numpy(dropped).float(),
            verifier_tokens=_verifier_tokens(scores[0], row_of_segment, n_rows),
            metrics=metrics,
            config=self.config,
        )

    @staticmethod
    def _check_policy(own: Float64, offsets: Int64) -> None:
        bad = np.flatnonzero(~np.isfinite(own))
        if bad.size:
            b = int(np.searchsorted(offsets, bad[0], side="right")) - 1
            raise InputError(
                f"policy_logprobs of response {b}, token {bad[0] - offsets[b]} is {own[bad[0]]}; "
                "expected the finite log-prob of a sampled token"
            )


def _on_host(rows: Any) -> Any:
    """Rows without tensors, wherever these lived; numpy knows no bfloat16."""
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().cpu()
        return rows.double().numpy() if rows.is_floating_point() else rows.numpy()
    return [_on_host(row) if isinstance(row, torch.Tensor) else row for row in rows]


def _like(values: Any, offsets: Int64, name: str) -> NDArray[Any]:
    """Per-token values of the same ragged shape as the ids, flat."""
    rows = [np.asarray(row) for row in _on_host(values)]
    if len(rows) != len(offsets) - 1:
        raise InputError(f"{name} has {len(rows)} rows for {len(offsets) - 1} responses")
    for b, row in enumerate(rows):
        expected = offsets[b + 1] - offsets[b]
        if row.shape != (expected,):
            raise InputError(
                f"{name} of response {b} has shape {row.shape}; expected one entry for each of "
                f"its {expected} tokens"
            )
    return np.concatenate([np.zeros(0), *rows])


def _sampled_rows(
    ids: list[Int64], sampled: NDArray[np.bool_], offsets: Int64
) -> tuple[Int64, Int64]:
    flat = np.concatenate([np.zeros(0, np.int64), *ids])[sampled]
    return flat, row_offsets(sampled.astype(np.int64))[offsets]


def _verifier_tokens(
    score: SegmentScores, row_of_segment: Int64, n_rows: int
) -> list[tuple[Int64, Float64]]:
    """Ids and log-probs of each response, its segments one after the other."""
    rows: list[list[tuple[Int64, Float64]]] = [[] for _ in range(n_rows)]
    for b, tokens in zip(row_of_segment.tolist(), score.verifier_tokens_n, strict=True):
        rows[b].append(tokens)
    nothing = np.zeros(0, np.int64), np.zeros(0)
    return [
        (
            np.concatenate([nothing[0], *(i for i, _ in row)]),
            np.concatenate([nothing[1], *(x for _, x in row)]),
        )
        if len(row) != 1
        else row[0]
        for row in rows
    ]


def _mean(values: NDArray[Any], empty: float = 0.0) -> float:
    return float(values.mean()) if values.size else empty


def _pad(flat: NDArray[Any], offsets: Int64) -> torch.Tensor:
    """Rows of a flat array as a tensor `[B, T]`, padded with 0 on the right."""
    lengths = np.diff(offsets)
    padded = np.zeros((len(lengths), lengths.max(initial=0)), dtype=flat.dtype)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(padded)
