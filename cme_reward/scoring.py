"""One verifier's scores of assistant turns, on the generator's tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64, row_offsets
from cme_reward._utf8 import WHOLE_CHAR
from cme_reward.alignment import align_batch
from cme_reward.config import CMEConfig
from cme_reward.errors import VerifierError
from cme_reward.prompts import PromptFormat, prompt_key
from cme_reward.segments import Segment
from cme_reward.spans import SpanTable
from cme_reward.verifiers.base import Verifier

Float64 = NDArray[np.float64]


@dataclass
class SegmentScores:
    """Scores of n segments with N generator tokens in all, one segment after the other."""

    aligned_N: Float64
    """Log-prob of each token in nats; the end of turn's on the EOS; 0 where not covered."""
    covered_N: NDArray[np.bool_]
    """Some of the token's text was scored, and all that the verifier does not drop."""
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
    seconds: float
    """Spent in the verifier."""


class MemberScorer:
    """A verifier with its prompt format and spans."""

    def __init__(self, verifier: Verifier, config: CMEConfig) -> None:
        self.verifier = verifier
        self.config = config
        self.format = PromptFormat(verifier.tokenizer, config)
        self.table = SpanTable(verifier.tokenizer)
        self.max_length = min(verifier.max_length, config.max_length or verifier.max_length)

    def score(self, segments: Sequence[Segment]) -> SegmentScores:
        """Score all segments in one call of the verifier."""
        is_chat, end_of_turn = self.format.is_chat, self.format.end_of_turn
        shown = [s.as_message() if is_chat else (s.text, s.ends) for s in segments]
        leads = [self.format.lead if is_chat and not s.chat_said else "" for s in segments]
        ids, ends, holes = self.table.encode_batch(
            [lead + text for lead, (text, _) in zip(leads, shown, strict=True)]
        )
        prompts = self._prompts(segments)
        ending = [] if end_of_turn is None or self.config.eos == "mask" else [end_of_turn]
        with_eos = np.array([bool(ending) and s.eos is not None for s in segments], dtype=bool)
        requests = [
            np.append(row, ending).astype(np.int64) if eos else row
            for row, eos in zip(ids, with_eos, strict=True)
        ]
        rooms = [max(0, self.max_length - len(prompt)) for prompt in prompts]
        truncated = np.array(
            [len(row) > room for row, room in zip(requests, rooms, strict=True)], dtype=bool
        )
        requests = [row[:room] for row, room in zip(requests, rooms, strict=True)]
        # A prompt that fills the context leaves nothing to ask.
        asked = [k for k, row in enumerate(requests) if len(row)]
        started = time.perf_counter()
        answers = self.verifier.logprobs(
            [prompts[k] for k in asked], [requests[k].tolist() for k in asked]
        )
        seconds = time.perf_counter() - started
        logprobs = self._checked(answers, requests, asked)

        aligned_ends = [e - WHOLE_CHAR * len(lead) for e, lead in zip(ends, leads, strict=True)]
        texts = [min(len(row), len(logp)) for row, logp in zip(ids, logprobs, strict=True)]
        cells = [
            _with_holes(logp[:n], np.maximum(e[:n], 0), np.maximum(h - WHOLE_CHAR * len(lead), 0))
            for logp, e, h, n, lead in zip(logprobs, aligned_ends, holes, texts, leads, strict=True)
        ]
        generator_ends = [ends for _, ends in shown]
        aligned = align_batch(
            [logp for logp, _ in cells], [ends for _, ends in cells], generator_ends
        )
        covered = []
        for k in range(len(segments)):
            limit = cells[k][1][-1] if len(cells[k][1]) else 0
            row = generator_ends[k] <= limit
            if len(holes[k]):
                row &= _outside(holes[k] - WHOLE_CHAR * len(leads[k]), generator_ends[k])
            covered.append(row)

        offsets = row_offsets([len(s.ends) for s in segments])
        aligned_N = np.concatenate([np.zeros(0), *aligned])
        is_eos_N = np.zeros(len(aligned_N), dtype=bool)
        for k in np.flatnonzero(with_eos & ~truncated).tolist():
            position = int(offsets[k]) + (segments[k].eos or 0)
            is_eos_N[position] = True
            aligned_N[position] = logprobs[k][-1]
        return SegmentScores(
            aligned_N=aligned_N,
            covered_N=np.concatenate([np.zeros(0, dtype=bool), *covered]),
            is_eos_N=is_eos_N,
            verifier_tokens_n=list(zip(requests, logprobs, strict=True)),
            sums_n=np.array([logp.sum() for logp in logprobs]),
            counts_n=np.array([len(logp) for logp in logprobs], dtype=np.int64),
            truncated_n=truncated,
            uniform=-float(np.log(self.verifier.vocab_size)),
            seconds=seconds,
        )

    def _prompts(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Prompt ids of each segment; rollouts of one prompt share one rendering."""
        rendered: dict[tuple[str, str], list[int]] = {}
        prompts = []
        for s in segments:
            prompt, said = (
                (s.chat_prompt, s.chat_said) if self.format.is_chat else (s.prompt, s.said)
            )
            key = prompt_key(prompt), said
            if key not in rendered:
                ids = self.format.render(prompt)
                if said:
                    lead = self.format.lead if self.format.is_chat else ""
                    ids = ids + self.table.encode(lead + said)[0].tolist()
                rendered[key] = ids
            prompts.append(rendered[key])
        return prompts

    def _checked(
        self, answers: Sequence[NDArray[np.float32]], requests: list[Int64], asked: list[int]
    ) -> list[Float64]:
        """Log-probs of every segment, as float64, with the floor."""
        if len(answers) != len(asked):
            raise VerifierError(
                f"{self.verifier.name} answered {len(answers)} of {len(asked)} responses"
            )
        logprobs = [np.zeros(0)] * len(requests)
        for k, answer in zip(asked, answers, strict=True):
            row = np.asarray(answer, dtype=np.float64)
            if row.shape != requests[k].shape:
                raise VerifierError(
                    f"{self.verifier.name} returned shape {row.shape} for response {k}; expected "
                    f"one log-prob for each of its {len(requests[k])} verifier tokens"
                )
            bad = np.flatnonzero(~np.isfinite(row))
            if bad.size:
                raise VerifierError(
                    f"{self.verifier.name} returned {row[bad[0]]} for response {k}, verifier token "
                    f"{bad[0]} (id {requests[k][bad[0]]}); expected a finite log-prob. A model in "
                    "float16 can overflow: load it in bfloat16 or float32"
                )
            if self.config.logprob_floor is not None:
                row = np.maximum(row, self.config.logprob_floor)
            logprobs[k] = row
        return logprobs


def _with_holes(logp_S: Float64, ends_S: Int64, holes: Int64) -> tuple[Float64, Int64]:
    """Text that the verifier drops as cells of log-prob 0, so that the ends tile the text."""
    if len(holes) and len(ends_S):
        stops = holes[holes[:, 1] <= ends_S[-1], 1]
        at = np.searchsorted(ends_S, stops)
        return np.insert(logp_S, at, 0), np.insert(ends_S, at, stops)
    return logp_S, ends_S


def _outside(holes: Int64, ends_T: Int64) -> NDArray[np.bool_]:
    """Which tokens have text outside the holes?"""
    lengths = np.diff(holes, axis=1)[:, 0]
    edges = holes.ravel()
    removed_before = np.repeat(row_offsets(lengths), 2)[1:-1]
    kept = ends_T - np.interp(ends_T, edges, removed_before)
    return np.diff(kept, prepend=0) > 0
