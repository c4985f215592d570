"""Responses -> numbers to rank them by: each setting of the reward, put together in several ways.

Eq. 3 of arXiv 2605.29009 is the mean of a response's verifier log-probs. Sums do not forgive a
long answer's one wrong word, nor do its worst tokens; both have ranked real rollouts better than
the mean (docs/evidence.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cme_reward.cli.jsonl import Bad, Good
from cme_reward.cli.rank_rows import Response
from cme_reward.cli.score import score_rows
from cme_reward.config import CMEConfig
from cme_reward.ranking.ranked import (
    LOWEST,
    MEAN,
    SHORTER,
    SUM,
    UNREPEATED,
    WORST,
    Ranked,
    repeated,
)
from cme_reward.ranking.remember import Remembering
from cme_reward.reward import CrossModelEntropy
from cme_reward.spans.table import SpanTable
from cme_reward.verifiers import Ensemble


@dataclass
class Reading:
    """A verifier under one or more settings, by what they are called; it reads each text once."""

    name: str
    scorers: dict[str, CrossModelEntropy]
    memories: list[Remembering]

    @property
    def table(self) -> SpanTable:
        """The generator's."""
        return next(iter(self.scorers.values())).table

    @classmethod
    def of(cls, name: str, base: CrossModelEntropy, settings: dict[str, CMEConfig]) -> Reading:
        """`settings` by name, "" for the first; `base` lends its verifier and its generator."""
        memories = [Remembering(member.verifier) for member in base.members]
        made = {
            called: CrossModelEntropy(
                Ensemble(memories) if len(memories) > 1 else memories[0],
                base.generator.tokenizer,
                config,
                padded_vocabulary=base.generator.padded_vocabulary,
            )
            for called, config in settings.items()
        }
        return cls(name, made, memories)


def rank_batch(
    readings: Sequence[Reading], responses: list[Response], counts: Counter[str], *, end: bool
) -> Iterator[Ranked | Bad]:
    """Scores of responses, in nats; those that one setting cannot score are Bad.

    Args:
        readings: who judges, and how.
        responses: what is judged.
        counts: `truncated` is added to.
        end: texts end with an end of turn.
    """
    ranked: list[Ranked | None] = [
        Ranked(one.line, one.group, one.written(readings[0].table), one.label) for one in responses
    ]
    bad: dict[int, Bad] = {}
    for reading in readings:
        # What scores the end of turn first: without it, the texts are beginnings of these.
        order = sorted(reading.scorers, key=lambda k: reading.scorers[k].config.eos != "score")
        for called in order:
            scorer = reading.scorers[called]
            eos_id = scorer.generator.end_of_turn if end else None
            left = [k for k, one in enumerate(ranked) if one is not None]
            rows: list[Good] = [responses[k] for k in left]
            for k, scored in zip(left, score_rows(scorer, rows, counts, eos_id), strict=True):
                if isinstance(scored, Bad):
                    ranked[k], bad[k] = None, scored
                    continue
                one = ranked[k]
                assert one is not None
                _, logprobs = scored.verifier_tokens
                prefix = _prefix(reading, called)
                one.scores[f"{prefix}: {MEAN}"] = scored.sequence_reward
                if len(reading.memories) == 1:  # an ensemble is averaged on the generator's tokens
                    worst = np.sort(logprobs)[:WORST]
                    one.scores[f"{prefix}: {SUM}"] = float(logprobs.sum())
                    one.scores[f"{prefix}: {LOWEST}"] = (
                        float(worst.mean()) if len(worst) else scored.sequence_reward
                    )
                one.tokens = one.tokens or len(logprobs)
        for memory in reading.memories:
            memory.forget()
    # As they were asked for: the verdict is on the first.
    names = [_prefix(reading, called) for reading in readings for called in reading.scorers]
    for k, one in enumerate(ranked):
        if one is None:
            yield bad[k]
            continue
        given = one.scores
        one.scores = {k: given[k] for name in names for k in given if k.startswith(f"{name}: ")}
        one.scores[SHORTER] = -float(one.tokens)
        one.scores[UNREPEATED] = -repeated(one.text)
        yield one


def _prefix(reading: Reading, called: str) -> str:
    """What a verifier's scores under a setting are called."""
    return ", ".join(part for part in (reading.name, called) if part)
