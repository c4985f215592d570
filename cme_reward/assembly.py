"""Scores of assistant turns -> the rewards of whole responses, each formula a function.

Over the M verifiers, V_m being the verifier's tokens of a response and t the generator's:

    Eq. 1:  token[t] = 1/M sum_m [aligned_m[t] - share_m[t] * policy[t]]
    Eq. 3:  sequence = 1/M sum_m [sum_{s in V_m} logp_m[s] - sum_t share_m[t] * policy[t]] / |V_m|

(arXiv 2605.29009, negated). `share_m[t]` is the share of token t's text that V_m writes: 0 for text
beyond the verifier's context or dropped by its tokenizer and for special tokens, 1 for an EOS whose
log-prob counts. So both sums are over one text, white space included, whatever the mask leaves out
of the tokens. `policy` is 0 unless `baseline="policy"`.

Arrays over all N tokens of B responses are flat, one response after the other; arrays over n
segments hold one entry for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cme_reward._ragged import Int64, pad, place_of, row_offsets, split, sums
from cme_reward.batch import CMEBatch
from cme_reward.config import CMEConfig
from cme_reward.conversation.turns import Segment
from cme_reward.errors import InputError
from cme_reward.metrics import METRICS, length_correlation, repetitions
from cme_reward.scoring import SegmentScores
from cme_reward.spans.kinds import BLANK, NO_TEXT, TEXT

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


class Layout:
    """Where the tokens and segments of B responses lie in flat arrays.

    Segments hold the sampled tokens in order: what they say of their own tokens is an array over
    the sampled tokens, which `spread` puts among the others. The responses are those of several
    calls, of which metrics are told apart: `sizes` are their numbers of responses.
    """

    def __init__(
        self, ids: Sequence[Int64], segments: Sequence[Segment], sizes: Sequence[int]
    ) -> None:
        self.sizes_C = np.array(sizes, dtype=np.int64)
        self.call_B = np.repeat(np.arange(len(sizes)), self.sizes_C)
        self.ids = ids
        self.segments = segments
        self.offsets = row_offsets([len(row) for row in ids])
        self.row_n = np.array([s.row for s in segments], dtype=np.int64)
        self.sampled_N = np.zeros(int(self.offsets[-1]), dtype=bool)
        for s in segments:
            self.sampled_N[self.offsets[s.row] + s.start : self.offsets[s.row] + s.stop] = True
        self.kinds = np.concatenate([np.zeros(0, np.uint8), *(s.kinds for s in segments)])
        """Of the sampled tokens."""

    def with_text(self, config: CMEConfig) -> Bool:
        """Of the sampled tokens, those that can have a reward for their text."""
        return (self.kinds == TEXT) | ((self.kinds == BLANK) & (config.whitespace == "keep"))

    def spread(self, values: NDArray) -> NDArray:
        """Of the sampled tokens, as `[N]`; 0 or False elsewhere."""
        flat = np.zeros(len(self.sampled_N), dtype=values.dtype)
        flat[self.sampled_N] = values
        return flat

    def of_tokens(self, values_N: NDArray) -> Float64:
        """Sums of each response over its tokens, `[B]`."""
        return sums(values_N, self.offsets)

    def of_segments(self, values_n: ArrayLike) -> Float64:
        """Sums of each response over its segments, `[B]`."""
        found = np.bincount(self.row_n, np.asarray(values_n, dtype=np.float64), len(self.ids))
        return found.astype(np.float64, copy=False)

    def by_call(self, values_B: ArrayLike) -> Float64:
        """Sums of each call, `[C]`."""
        return np.bincount(self.call_B, values_B, len(self.sizes_C)).astype(np.float64, copy=False)

    def means(self, sums_B: NDArray, counts_B: NDArray | None = None, empty: float = 0) -> Float64:
        """Means of each call, `[C]`: over its responses, or over what they have so many of."""
        counts_C = self.sizes_C if counts_B is None else self.by_call(counts_B)
        return np.where(counts_C, self.by_call(sums_B) / np.maximum(counts_C, 1), empty)

    def flagged(self, rows: ArrayLike) -> Float64:
        """How many different responses of each call are among these, `[C]`."""
        flags_B = np.zeros(len(self.ids))
        flags_B[np.asarray(rows, dtype=np.int64)] = 1
        return self.by_call(flags_B)

    @property
    def sampled_ids(self) -> list[Int64]:
        """The sampled tokens of each response."""
        flat = np.concatenate([np.zeros(0, np.int64), *self.ids])[self.sampled_N]
        return split(flat, row_offsets(self.sampled_N.astype(np.int64))[self.offsets])


def assemble(
    ids: list[Int64],
    segments: list[Segment],
    scores: Sequence[SegmentScores],
    policy: Float64 | None,
    config: CMEConfig,
    sizes: Sequence[int],
) -> list[CMEBatch]:
    """The rewards of all responses from each verifier's scores of their segments.

    `policy` holds the policy's log-probs `[N]`, or is None. `sizes` are the numbers of responses
    of the calls that these are of; each has a batch. The metrics of time are left to the caller.

    Raises:
        InputError: for a policy log-prob that is not finite where its share counts.
    """
    layout = Layout(ids, segments, sizes)
    logprobs_N = layout.spread(np.mean([score.aligned_N for score in scores], axis=0))
    own = [policy_part(policy, score, layout) for score in scores]
    scored_N = scored_tokens(scores, layout, config)
    rewards_N = token_rewards(logprobs_N, own, scored_N)
    sequence_B = sequence_rewards(scores, own, layout)
    dropped_B = dropped_nats(logprobs_N, scored_N, scores, layout)
    metrics = {
        **_of_rewards(rewards_N, scored_N, layout),
        "sequence_reward_mean": layout.means(sequence_B),
        "dropped_nats": layout.means(dropped_B),
        **_of_reading(scores, layout),
        **_of_responses(sequence_B, layout),
    }
    if config.level == "sequence":
        rewards_N, scored_N = on_last_token(sequence_B, layout), layout.sampled_N
    flat = {
        "token_rewards": rewards_N.astype(np.float32),
        "mask": scored_N,
        "sampled": layout.sampled_N,
        "token_logprobs": logprobs_N.astype(np.float32),
    }
    tokens = _verifier_tokens(scores[0], layout)
    values = {name: metrics[name].tolist() for name in METRICS if name in metrics}
    batches = []
    for c, (i, j) in enumerate(pairwise(row_offsets(sizes).tolist())):
        start, offsets = layout.offsets[i], layout.offsets[i : j + 1]
        padded = pad(offsets - start, *(array[start : offsets[-1]] for array in flat.values()))
        batches.append(
            CMEBatch(
                **dict(zip(flat, padded, strict=True)),
                sequence_rewards=torch.from_numpy(sequence_B[i:j]).float(),
                dropped_nats=torch.from_numpy(dropped_B[i:j]).float(),
                verifier_tokens=tokens[i:j],
                metrics={name: of_calls[c] for name, of_calls in values.items()},
                config=config,
            )
        )
    return batches


def token_rewards(logprobs_N: Float64, own: Sequence[Float64], scored_N: Bool) -> Float64:
    """Eq. 1: aligned log-probs, mean over verifiers, less the policy's own; 0 where masked."""
    return np.where(scored_N, logprobs_N - sum(own) / len(own), 0)


def sequence_rewards(
    scores: Sequence[SegmentScores], own: Sequence[Float64], layout: Layout
) -> Float64:
    """Eq. 3: log-probs per verifier token, mean over verifiers, `[B]`; a uniform guess where a
    verifier scored nothing."""
    sequence_B = np.zeros(len(layout.ids))
    for score, own_N in zip(scores, own, strict=True):
        sums_B = layout.of_segments(score.sums_n) - layout.of_tokens(own_N)
        counts_B = layout.of_segments(score.counts_n)
        means_B = np.where(counts_B > 0, sums_B / np.maximum(counts_B, 1), score.uniform)
        sequence_B += means_B / len(scores)
    return sequence_B


def scored_tokens(scores: Sequence[SegmentScores], layout: Layout, config: CMEConfig) -> Bool:
    """Appendix B's mask, `[N]`: tokens with text, all of which every verifier scored that keeps it;
    and an EOS that has the end of turn's log-prob."""
    is_eos = np.logical_and.reduce([score.is_eos_N for score in scores])
    return layout.spread((layout.with_text(config) & _covered(scores)) | is_eos)


def dropped_nats(
    logprobs_N: Float64, scored_N: Bool, scores: Sequence[SegmentScores], layout: Layout
) -> Float64:
    """Surprise on masked tokens: all of a response's, less that of its scored tokens, `[B]`.

    Floored at 0: a sum of a few thousand aligned log-probs ends some 1e-12 off.
    """
    totals_B = sum(layout.of_segments(score.sums_n) / len(scores) for score in scores)
    kept_B = layout.of_tokens(np.where(scored_N, logprobs_N, 0))
    return np.maximum(kept_B - totals_B, 0)


def on_last_token(sequence_B: Float64, layout: Layout) -> Float64:
    """Each sequence reward on the last sampled token, as frameworks place a scalar; 0 elsewhere."""
    rewards_N = np.zeros(len(layout.sampled_N))
    last = {s.row: layout.offsets[s.row] + s.stop - 1 for s in layout.segments if s.stop > s.start}
    for b, position in last.items():
        rewards_N[position] = sequence_B[b]
    return rewards_N


def policy_part(policy: Float64 | None, score: SegmentScores, layout: Layout) -> Float64:
    """`share[t] * policy[t]`: the policy's log-probs of the text that a verifier scored, `[N]`."""
    own_N = np.zeros(len(layout.sampled_N))
    if policy is None:
        return own_N
    counted = np.flatnonzero(layout.sampled_N)[score.share_N > 0]
    own_N[counted] = policy[counted] * score.share_N[score.share_N > 0]
    for at in np.flatnonzero(~np.isfinite(own_N))[:1]:
        b, position = place_of(at, layout.offsets)
        raise InputError(
            f"policy_logprobs of response {b}, token {position} is {policy[at]}; "
            "expected the finite log-prob of a sampled token"
        )
    return own_N


def _of_rewards(rewards_N: Float64, scored_N: Bool, layout: Layout) -> dict[str, Float64]:
    """Mean and sample standard deviation of each call's rewards; 0 of too few."""
    scored_B = layout.of_tokens(scored_N)
    means_C = layout.means(layout.of_tokens(rewards_N), scored_B)
    means_N = np.repeat(means_C[layout.call_B], np.diff(layout.offsets))
    squares_B = layout.of_tokens(np.where(scored_N, rewards_N - means_N, 0) ** 2)
    degrees_C = np.maximum(layout.by_call(scored_B) - 1, 1)
    return {
        "token_reward_mean": means_C,
        "token_reward_std": np.sqrt(layout.by_call(squares_B) / degrees_C),
    }


def _of_reading(scores: Sequence[SegmentScores], layout: Layout) -> dict[str, Float64]:
    """Metrics of how much of the responses of each call the verifiers read."""
    segments = layout.segments
    truncated_n = np.logical_or.reduce([score.truncated_n for score in scores])
    counts_n = np.sum([score.counts_n for score in scores], axis=0) / len(scores)
    sampled_C = layout.by_call(layout.of_tokens(layout.sampled_N))
    inked = layout.kinds == TEXT  # white space a normaliser may take (BERT's, T5's)
    covered_B = layout.of_tokens(layout.spread(inked & _covered(scores)))
    inner_B = layout.of_tokens(layout.spread(layout.kinds == NO_TEXT))
    # Not the token that ends a turn, behind which there is padding alone.
    inner_B -= layout.of_segments([0 if s.eos is None else len(s.kinds) - s.eos for s in segments])
    thinking_B = layout.of_segments([s.n_thinking for s in segments])
    unclosed = layout.flagged([s.row for s in segments if s.unclosed])
    return {
        "coverage": layout.means(covered_B, layout.of_tokens(layout.spread(inked)), empty=1),
        "verifier_tokens_per_token": layout.by_call(layout.of_segments(counts_n))
        / np.maximum(sampled_C, 1),
        "truncated": layout.flagged(layout.row_n[truncated_n]),
        "special_masked": layout.means(inner_B),
        "thinking_tokens": layout.means(thinking_B),
        "thinking_unclosed": unclosed / np.maximum(layout.sizes_C, 1),
    }


def _of_responses(sequence_B: Float64, layout: Layout) -> dict[str, Float64]:
    """Metrics of the responses of each call themselves."""
    lengths_B = layout.of_tokens(layout.sampled_N)
    blank_B = layout.of_tokens(layout.spread(layout.kinds == BLANK))
    calls = pairwise(row_offsets(layout.sizes_C).tolist())
    return {
        "repetition": layout.means(repetitions(layout.sampled_ids)),
        "whitespace": layout.means(blank_B / np.maximum(lengths_B, 1)),
        "length_correlation": np.array(
            [length_correlation(sequence_B[i:j], lengths_B[i:j]) for i, j in calls]
        ),
    }


def _covered(scores: Sequence[SegmentScores]) -> Bool:
    """Of the sampled tokens, those that every verifier covers."""
    return np.logical_and.reduce([score.covered_N for score in scores])


def _verifier_tokens(score: SegmentScores, layout: Layout) -> list[tuple[Int64, Float64]]:
    """Ids and log-probs of each response, its segments one after the other."""
    rows: list[list[tuple[Int64, Float64]]] = [[] for _ in layout.ids]
    for b, tokens in zip(layout.row_n.tolist(), score.verifier_tokens_n, strict=True):
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
