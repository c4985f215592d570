"""One verifier's scores of assistant turns, on the generator's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cme_reward._keys import prompt_key
from cme_reward._lru import LRU
from cme_reward._ragged import Int64, place_of, row_offsets, split, sums
from cme_reward.alignment import align_batch
from cme_reward.config import CMEConfig
from cme_reward.conversation.format import PROMPTS_KEPT, PromptFormat
from cme_reward.conversation.messages import Prompt
from cme_reward.conversation.thinking import Start, start_of
from cme_reward.conversation.turns import Segment, Shown
from cme_reward.errors import VerifierError
from cme_reward.spans.table import Encoded, SpanTable
from cme_reward.verifiers.base import TokenIds, Verifier
from cme_reward.verifiers.shared import shared

Float64 = NDArray[np.float64]


@dataclass
class SegmentScores:
    """Scores of n segments with N generator tokens in all, one segment after the other."""

    aligned_N: Float64
    """Log-prob of each token in nats; the end of turn's on the EOS; 0 where not covered."""
    covered_N: NDArray[np.bool_]
    """Some of the token's text was scored, and all that the verifier does not drop."""
    share_N: Float64
    """The share of each token's text that was scored; 1 for an EOS that was, 0 without text."""
    is_eos_N: NDArray[np.bool_]
    """The token is an EOS that has the end of turn's log-prob."""
    verifier_tokens_n: list[tuple[Int64, Float64]]
    """Ids and log-probs of each segment's verifier tokens, end of turn included."""
    sums_n: Float64
    """Sums of those log-probs, in nats."""
    counts_n: Int64
    """Numbers of those tokens."""
    truncated_n: NDArray[np.bool_]
    """The verifier's context ended before the segment did."""
    uniform: float
    """Log-prob of a uniform guess, in nats."""


@dataclass
class Question:
    """What one verifier is asked about n segments, and what it takes to read the answer."""

    segments: Sequence[Segment]
    shown: list[Shown]
    encoded: Encoded
    prompts_n: list[Int64]
    requests_n: list[Int64]
    """Verifier ids to be scored: the text, and the end of turn where there is one."""
    with_eos_n: NDArray[np.bool_]
    truncated_n: NDArray[np.bool_]

    @property
    def asked(self) -> list[int]:
        """The segments with anything to score: a prompt may fill the context, a text be empty."""
        return [k for k, request in enumerate(self.requests_n) if len(request)]

    @property
    def arguments(self) -> tuple[list[TokenIds], list[TokenIds]]:
        """Of `Verifier.logprobs`."""
        return [self.prompts_n[k] for k in self.asked], [self.requests_n[k] for k in self.asked]

    def part(self, segments: Sequence[Segment], at: slice) -> Question:
        """The question of some of the segments, these in place of the own."""
        return Question(
            segments,
            self.shown[at],
            Encoded(*(rows[at] for rows in self.encoded)),
            self.prompts_n[at],
            self.requests_n[at],
            self.with_eos_n[at],
            self.truncated_n[at],
        )


def joined(questions: Sequence[Question], segments: Sequence[Segment]) -> Question:
    """One question in place of several, of these segments."""
    return Question(
        segments,
        [shown for q in questions for shown in q.shown],
        Encoded(
            *(list(chain(*rows)) for rows in zip(*(q.encoded for q in questions), strict=True))
        ),
        [row for q in questions for row in q.prompts_n],
        [row for q in questions for row in q.requests_n],
        np.concatenate([q.with_eos_n for q in questions]),
        np.concatenate([q.truncated_n for q in questions]),
    )


class MemberScorer:
    """One verifier with its prompt format and spans: what to `ask` it, and how to `read` it.

    Asking the verifier lies between the two, where a caller waits as it likes:

        question = member.ask(segments)
        scores = member.read(question, member.verifier.logprobs(*question.arguments))
    """

    def __init__(self, verifier: Verifier, config: CMEConfig) -> None:
        self.verifier = verifier
        self.config = config
        self.format = PromptFormat(verifier.tokenizer, config)
        self.table = SpanTable(verifier.tokenizer)
        self.max_length = min(verifier.max_length, config.max_length or verifier.max_length)
        self._rendered: LRU[Int64] = LRU(*PROMPTS_KEPT)

    @cached_property
    def shared(self) -> Any:
        """The verifier, or a stand-in through which coroutines take turns with it."""
        return shared(self.verifier)

    def ask(self, segments: Sequence[Segment]) -> Question:
        """What the verifier is to be asked about these segments."""
        shown = [s.shown(self.format) for s in segments]
        encoded = self.table.encode_batch([s.whole for s in shown])
        prompts = self._prompts(segments)
        end_of_turn = self.format.end_of_turn if self.config.eos == "score" else None
        with_eos_n = np.array(
            [end_of_turn is not None and s.eos is not None for s in segments], dtype=bool
        )
        requests, truncated_n = [], np.zeros(len(segments), dtype=bool)
        for k, row in enumerate(encoded.ids):
            request = np.append(row, np.int64(end_of_turn or 0)) if with_eos_n[k] else row
            room = max(0, self.max_length - len(prompts[k]))
            truncated_n[k] = len(request) > room
            requests.append(request[:room])
        return Question(segments, shown, encoded, prompts, requests, with_eos_n, truncated_n)

    def read(self, question: Question, answers: Sequence[Any]) -> SegmentScores:
        """What the verifier's answers say about the segments.

        Raises:
            VerifierError: for answers that are not the log-probs asked for.
        """
        segments, shown, encoded = question.segments, question.shown, question.encoded
        with_eos_n, truncated_n = question.with_eos_n, question.truncated_n
        requests, answers = list(question.requests_n), self._checked(question, answers)
        offsets = row_offsets([len(s.ends) for s in segments])
        aligned_N, covered_N, share_N = _place(shown, encoded, answers, truncated_n, offsets)
        for k, segment in enumerate(segments):
            if segment.share_T is not None:
                share_N[offsets[k] : offsets[k + 1]] *= segment.share_T
        is_eos_N = np.zeros(len(aligned_N), dtype=bool)
        for k in np.flatnonzero(with_eos_n & ~truncated_n).tolist():
            position = int(offsets[k]) + (segments[k].eos or 0)
            is_eos_N[position] = True
            share_N[position] = 1
            aligned_N[position] = answers[k][-1]
        # Tokens that hold nothing but the template's white space are no part of the response.
        for k, (s, ends_S) in enumerate(zip(shown, encoded.ends, strict=True)):
            if s.lead:
                own = slice(int(np.count_nonzero(s.within(ends_S) == 0)), None)
                requests[k], answers[k] = requests[k][own], answers[k][own]
        counts_n = np.array([len(logp) for logp in answers], dtype=np.int64)
        return SegmentScores(
            aligned_N=aligned_N,
            covered_N=covered_N,
            share_N=share_N,
            is_eos_N=is_eos_N,
            verifier_tokens_n=list(zip(requests, answers, strict=True)),
            sums_n=sums(np.concatenate([np.zeros(0), *answers]), row_offsets(counts_n)),
            counts_n=counts_n,
            truncated_n=truncated_n,
            uniform=-float(np.log(self.verifier.vocab_size)),
        )

    def _prompts(self, segments: Sequence[Segment]) -> list[Int64]:
        """Prompt ids of each segment; rollouts of one prompt share one rendering."""
        prompts = []
        for s in segments:
            prompt, said = (
                (s.chat_prompt, s.chat_said) if self.format.is_chat else (s.prompt, s.said)
            )
            start: Start = "answer"
            if self.format.prefill or self.format.header:
                start = start_of((said, s.text), self.config.thinking_tags)
            key = prompt_key(prompt), said
            render = partial(self._render, prompt, said, start)
            prompts.append(self._rendered.get((*key, start), render, sum(map(len, key))))
        return prompts

    def _render(self, prompt: Prompt, said: str, start: Start) -> Int64:
        ids = np.array(self.format.render(prompt, start), dtype=np.int64)
        if said:
            ids = np.concatenate([ids, self.table.encode(self.format.lead + said)[0]])
        return ids

    def _checked(self, question: Question, answers: Sequence[Any]) -> list[Float64]:
        """The verifier's log-probs of each request, checked, and raised to the floor."""
        asked, requests, segments = question.asked, question.requests_n, question.segments
        name = self.verifier.name
        if len(answers) != len(asked):
            raise VerifierError(f"{name} answered {len(answers)} of {len(asked)} responses")
        rows = [np.asarray(answer) for answer in answers]
        for k, row in zip(asked, rows, strict=True):
            if row.shape != requests[k].shape:
                raise VerifierError(
                    f"{name} returned shape {row.shape} for response {segments[k].row}; expected "
                    f"one log-prob for each of its {len(requests[k])} verifier tokens"
                )
        flat = np.concatenate([np.zeros(0), *rows]).astype(np.float64, copy=False)
        offsets = row_offsets([len(request) for request in requests])  # 0 where nothing was asked
        for at in np.flatnonzero(~np.isfinite(flat))[:1]:
            k, s = place_of(at, offsets)
            raise VerifierError(
                f"{name} returned {flat[at]} for response {segments[k].row}, verifier token {s} "
                f"(id {requests[k][s]}); expected a finite log-prob. A model in float16 can "
                "overflow: load it in bfloat16 or float32"
            )
        floor = self.config.logprob_floor
        return split(flat if floor is None else np.maximum(flat, floor), offsets)


def _place(
    shown: list[Shown],
    encoded: Encoded,
    answers: list[Float64],
    truncated_n: NDArray[np.bool_],
    offsets: Int64,
) -> tuple[Float64, NDArray[np.bool_], Float64]:
    """Log-probs on the generator's tokens `[N]`; whether these are covered; their shares."""
    ends_N = np.concatenate([np.zeros(0, np.int64), *(own.ends for own in shown)])
    widths_N = np.diff(ends_N, prepend=0)
    begin = offsets[:-1][np.diff(offsets) > 0]
    widths_N[begin] = ends_N[begin]
    share_N = (widths_N > 0).astype(np.float64)  # of rows that are read whole
    covered_N = widths_N > 0
    logprobs, verifier_ends = [], []
    for k, (own, ends_S, holes, answer) in enumerate(
        zip(shown, encoded.ends, encoded.holes, answers, strict=True)
    ):
        ends_S = own.within(ends_S)
        n = min(len(ends_S), len(answer))  # the end of turn has no text
        logp_S, ends_S = answer[:n], ends_S[:n]
        if truncated_n[k] or len(holes):
            row, holes = slice(offsets[k], offsets[k + 1]), own.within(holes)
            scored_to = (ends_S if truncated_n[k] else own.ends)[-1:].sum()
            share_N[row] = _shares(own.ends, holes, scored_to)
            covered_N[row] = (share_N[row] > 0) & (own.ends <= scored_to)
            logp_S, ends_S = _with_holes(logp_S, ends_S, holes)
        logprobs.append(logp_S)
        verifier_ends.append(ends_S)
    aligned = align_batch(logprobs, verifier_ends, [own.ends for own in shown])
    return np.concatenate([np.zeros(0), *aligned]), covered_N, share_N


def _with_holes(logp_S: Float64, ends_S: Int64, holes: Int64) -> tuple[Float64, Int64]:
    """Text that the verifier drops as cells of log-prob 0, so that the ends tile the text."""
    if len(holes) and len(ends_S):
        stops = holes[holes[:, 1] <= ends_S[-1], 1]
        at = np.searchsorted(ends_S, stops)
        return np.insert(logp_S, at, 0), np.insert(ends_S, at, stops)
    return logp_S, ends_S


def _shares(ends_T: Int64, holes: Int64, scored_to: np.int64) -> Float64:
    """What share of each token's text lies before `scored_to` and outside the holes?"""
    within_T = np.minimum(ends_T, scored_to)
    if len(holes):
        lengths = np.diff(holes, axis=1)[:, 0]
        removed_before = np.repeat(row_offsets(lengths), 2)[1:-1]
        within_T = within_T - np.interp(within_T, holes.ravel(), removed_before)
    return np.diff(within_T, prepend=0) / np.maximum(np.diff(ends_T, prepend=0), 1)
