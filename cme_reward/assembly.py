"""Scores of assistant turns -> the rewards and metrics of whole responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cme_reward._ragged import Int64, row_offsets, split
from cme_reward._rows import pad
from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.conversation.turns import Segment
from cme_reward.errors import InputError
from cme_reward.metrics import length_correlation, repetition
from cme_reward.scoring import SegmentScores
from cme_reward.spans.table import BLANK, NO_TEXT, TEXT

Float64 = NDArray[np.float64]


def assemble(
    ids: list[Int64],
    segments: list[Segment],
    scores: Sequence[SegmentScores],
    policy: Float64 | None,
    config: CMEConfig,
) -> CMEBatch:
    """The rewards of all responses from each verifier's scores of their segments.

    Over the M verifiers, with V_m the verifier's tokens of a response (Eq. 3), t the generator's:

        sequence = 1/M sum_m [sum_{s in V_m} logp_m[s] - sum_t share_m[t] * policy[t]] / |V_m|
        token[t] = 1/M sum_m [aligned_m[t] - share_m[t] * policy[t]]

    `share_m[t]` is the share of token t's text that V_m writes: 0 for text beyond the verifier's
    context or dropped by its tokenizer and for special tokens, 1 for an EOS whose log-prob counts.
    So both sums are over one text, white space included, whatever `mask` leaves out of the tokens.
    `policy` is flat over all tokens, and 0 unless `baseline="policy"`. The metrics of time are left
    to the caller.

    Raises:
        InputError: for a policy log-prob that is not finite where its share counts.
    """
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
    logprobs[sampled] = sum(score.aligned_N for score in scores) / len(scores)
    with_text = (kinds == TEXT) | ((kinds == BLANK) & (config.whitespace == "keep"))
    covered = np.logical_and.reduce([score.covered_N for score in scores])
    is_eos = np.logical_and.reduce([score.is_eos_N for score in scores])
    scored = sampled.copy()
    scored[sampled] = (with_text & covered) | is_eos
    own = [_own(policy, score, sampled, offsets) for score in scores]
    rewards = np.where(scored, logprobs - sum(own) / len(scores), 0)

    sequence, total = np.zeros(n_rows), np.zeros(n_rows)
    for score, own_N in zip(scores, own, strict=True):
        sums = per_row(score.sums_n, row_of_segment)
        counts = per_row(score.counts_n, row_of_segment)
        means = (sums - per_row(own_N, row_of_token)) / np.maximum(counts, 1)
        sequence += np.where(counts > 0, means, score.uniform) / len(scores)
        total += sums / len(scores)
    # Floored at 0: a sum of a few thousand aligned log-probs ends some 1e-12 off.
    kept = per_row(np.where(scored, logprobs, 0), row_of_token)
    dropped = np.maximum(kept - total, 0)

    truncated = np.logical_or.reduce([score.truncated_n for score in scores])
    n_verifier_tokens = sum(score.counts_n.sum() for score in scores) / len(scores)
    metrics = {
        "token_reward_mean": _mean(rewards[scored]),
        "token_reward_std": float(rewards[scored].std(ddof=1)) if scored.sum() > 1 else 0.0,
        "sequence_reward_mean": _mean(sequence),
        "coverage": _mean(covered[with_text], empty=1.0),
        "dropped_nats": _mean(dropped),
        "verifier_tokens_per_token": float(n_verifier_tokens / max(sampled.sum(), 1)),
        "truncated": float(len(set(row_of_segment[truncated].tolist()))),
        "repetition": repetition(split(*_sampled_rows(ids, sampled, offsets))),
        "length_correlation": length_correlation(sequence, per_row(sampled, row_of_token)),
        "special_masked": sum(map(_inner_specials, segments)) / max(n_rows, 1),
        "thinking_tokens": sum(s.n_thinking for s in segments) / max(n_rows, 1),
        "thinking_unclosed": len({s.row for s in segments if s.unclosed}) / max(n_rows, 1),
    }
    if config.level == "sequence":
        rewards, scored = np.zeros(n_tokens), sampled
        last = {s.row: int(offsets[s.row]) + s.stop - 1 for s in segments if s.stop > s.start}
        for b, position in last.items():
            rewards[position] = sequence[b]
    return CMEBatch(
        token_rewards=pad(rewards.astype(np.float32), offsets),
        mask=pad(scored, offsets),
        sequence_rewards=torch.from_numpy(sequence).float(),
        token_logprobs=pad(logprobs.astype(np.float32), offsets),
        dropped_nats=torch.from_numpy(dropped).float(),
        verifier_tokens=_verifier_tokens(scores[0], row_of_segment, n_rows),
        metrics=metrics,
        config=config,
    )


def _inner_specials(segment: Segment) -> int:
    """Special tokens of a segment whose text is left out, but for its end and the padding there."""
    return int(np.count_nonzero(segment.kinds[: segment.eos] == NO_TEXT))


def _own(
    policy: Float64 | None, score: SegmentScores, sampled: NDArray[np.bool_], offsets: Int64
) -> Float64:
    """The policy's log-probs of the text that a verifier scored, flat over all tokens."""
    own = np.zeros(len(sampled))
    if policy is None:
        return own
    counted = np.flatnonzero(sampled)[score.share_N > 0]
    own[counted] = policy[counted] * score.share_N[score.share_N > 0]
    bad = np.flatnonzero(~np.isfinite(own))
    if bad.size:
        b = int(np.searchsorted(offsets, bad[0], side="right")) - 1
        raise InputError(
            f"policy_logprobs of response {b}, token {bad[0] - offsets[b]} is {policy[bad[0]]}; "
            "expected the finite log-prob of a sampled token"
        )
    return own


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
