"""Responses -> numbers to rank them by: each setting of the reward, put together in several ways.

Eq. 3 of arXiv 2605.29009 is the mean of a response's verifier log-probs. Sums do not forgive a
long answer's one wrong word, nor do its worst tokens; both have ranked real rollouts better than
the mean (docs/evidence.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cme_reward.cli.jsonl import Bad, Good
from cme_reward.cli.rank_rewards import Policy, Rival
from cme_reward.cli.rank_rows import Response
from cme_reward.cli.score import in_halves, score_rows
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
    readings: Sequence[Reading],
    responses: list[Response],
    counts: Counter[str],
    *,
    end: bool,
    rivals: Sequence[Rival] = (),
    policy: Policy | None = None,
) -> Iterator[Ranked | Bad]:
    """Scores of responses; those that one setting or reward cannot score are Bad.

    Args:
        readings: who judges, and how.
        responses: what is judged.
        counts: `truncated` is added to.
        end: texts end with an end of turn.
        rivals: other rewards; those that compare rollouts wait for `finish`.
        policy: what wrote the responses, where a rival or the baseline asks what it says of them.
    """
    ranked: list[Ranked | None] = [
        Ranked(one.line, one.group, one.written(readings[0].table), one.label) for one in responses
    ]
    bad: dict[int, Bad] = {}
    generator = next(iter(readings[0].scorers.values())).generator
    eos_id = generator.end_of_turn if end else None
    for k, said in enumerate(policy.read(responses, generator.table, eos_id) if policy else ()):
        if isinstance(said, Bad):
            ranked[k], bad[k] = None, said
            continue
        assert said.logprobs is not None
        responses[k].said, responses[k].policy_logprobs = said, said.logprobs[0].tolist()
    for reading in readings:
        # What scores the end of turn first: without it, the texts are beginnings of these.
        order = sorted(reading.scorers, key=lambda k: reading.scorers[k].config.eos != "score")
        for called in order:
            scorer = reading.scorers[called]
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
                # An ensemble is averaged on the generator's tokens, and a baseline lies on them.
                if len(reading.memories) == 1 and scorer.config.baseline == "none":
                    worst = np.sort(logprobs)[:WORST]
                    one.scores[f"{prefix}: {SUM}"] = float(logprobs.sum())
                    one.scores[f"{prefix}: {LOWEST}"] = (
                        float(worst.mean()) if len(worst) else scored.sequence_reward
                    )
                one.tokens = one.tokens or len(logprobs)
        for memory in reading.memories:
            memory.forget()
    for rival in rivals:
        if rival.reward.compares_rollouts:
            continue
        left = [k for k, one in enumerate(ranked) if one is not None]
        scores = in_halves([responses[k] for k in left], partial(rival.score, eos_id=eos_id))
        for k, score in zip(left, scores, strict=True):
            one = ranked[k]
            assert one is not None
            if isinstance(score, Bad):
                ranked[k], bad[k] = None, score
            else:
                one.scores[rival.name] = score
    # As they were asked for: the verdict is on the first.
    names = [_prefix(reading, called) for reading in readings for called in reading.scorers]
    for k, one in enumerate(ranked):
        if one is None:
            yield bad[k]
            continue
        given, responses[k].said = one.scores, None
        one.scores = {k: given[k] for name in names for k in given if k.startswith(f"{name}: ")}
        one.scores |= {rival.name: given[rival.name] for rival in rivals if rival.name in given}
        yield one


def finish(
    ranked: Sequence[Ranked], responses: Sequence[Response], rivals: Sequence[Rival], *, end: bool
) -> None:
    """The scores that take all responses to a prompt, and those that take no model."""
    for rival in rivals:
        if rival.reward.compares_rollouts:
            eos_id = rival.reward.generator.end_of_turn if end else None
            for one, score in zip(ranked, rival.score(responses, eos_id), strict=True):
                one.scores[rival.name] = score
    for one in ranked:
        one.scores[SHORTER] = -float(one.tokens)
        one.scores[UNREPEATED] = -repeated(one.text)


def _prefix(reading: Reading, called: str) -> str:
    """What a verifier's scores under a setting are called."""
    return ", ".join(part for part in (reading.name, called) if part)
