"""Several calls of a reward as one, and as several again: most of a small one's time is numpy's."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cme_reward._ragged import Int64, place_of, require_pairs, row_offsets
from cme_reward.conversation.messages import Prompt
from cme_reward.conversation.turns import Segment
from cme_reward.errors import InputError, VerifierError
from cme_reward.scoring import Question, joined

Float64 = NDArray[np.float64]


class Arguments(NamedTuple):
    """Of a call, as given."""

    prompts: Sequence[Prompt]
    response_ids: Any
    response_masks: Any = None
    policy_logprobs: Any = None


class Call(NamedTuple):
    """Checked arguments of a call, cut into assistant turns."""

    ids: list[Int64]
    segments: list[Segment]
    policy: Float64 | None


UNSAMPLED = -30.0
"""Nats: one token in 10^13. What a policy gives less it does not sample, in any vocabulary."""


def doubtful(policy_N: Float64, sampled_N: NDArray[np.bool_], offsets: Int64) -> str:
    """Which log-prob is hardly that of what the policy sampled; empty where none is.

    It is that of another token then: a row is shifted by one, or ends with an id that stands for
    what the policy wrote there (a stop string, a line's end).
    """
    found = np.flatnonzero(sampled_N & np.isfinite(policy_N) & (policy_N < UNSAMPLED))
    if not len(found):
        return ""
    b, position = place_of(found[0], offsets)
    return (
        f"policy_logprobs of response {b}, token {position} is {policy_N[found[0]]:.1f} nats, less "
        "than a policy gives what it samples. Expected the log-prob of each sampled id, the one "
        "that ends a response included, at the sampling temperature"
    )


class Answered(NamedTuple):
    """A call, and for each verifier what it was asked and answered."""

    call: Call
    questions: list[Question]
    answers: Sequence[Sequence[Any]]


def merged(many: Sequence[Arguments]) -> Arguments:
    """The arguments of all calls, one after the other.

    Raises:
        InputError: where rows would get to another call's responses.
    """
    if len(many) == 1:
        return many[0]
    columns: tuple[list[Any], ...] = ([], [], [], [])
    for given in many:
        require_pairs(given.prompts, given.response_ids)
        n = len(given.response_ids)
        for column, rows in zip(columns, given, strict=True):
            column += [None] * n if rows is None else rows
            if len(column) != len(columns[0]):
                raise InputError(f"another number of rows than {n} responses")
    masks, policies = columns[2:]
    return Arguments(
        *columns[:2],
        None if all(row is None for row in masks) else masks,
        None if any(row is None for row in policies) else policies,
    )


def parted(
    whole: Call, questions: Sequence[Question], sizes: Sequence[int]
) -> list[tuple[Call, list[Question]]]:
    """Calls of so many responses each, with the rows of their own, and what each of them asks."""
    if len(sizes) == 1:
        return [(whole, list(questions))]
    rows = row_offsets(sizes)
    at = np.searchsorted([s.row for s in whole.segments], rows)
    tokens = row_offsets([len(row) for row in whole.ids])[rows]
    parts = []
    for (i, j), (m, n), (s, t) in zip(*(pairwise(x.tolist()) for x in (rows, at, tokens)),
                                      strict=True):  # fmt: skip
        policy = None if whole.policy is None else whole.policy[s:t]
        call = Call(whole.ids[i:j], _moved(whole.segments[m:n], -i), policy)
        parts.append((call, [q.part(call.segments, slice(m, n)) for q in questions]))
    return parts


def united(many: Sequence[Answered]) -> Answered:
    """All calls as one: what `parted` took apart, in whatever company.

    Raises:
        VerifierError: where answers would get to another call's responses.
    """
    if len(many) == 1:
        return many[0]
    for each in many:
        for question, answers in zip(each.questions, each.answers, strict=True):
            if len(answers) != len(question.asked):
                raise VerifierError(f"{len(answers)} answers to {len(question.asked)} responses")
    calls = [each.call for each in many]
    rows = row_offsets([len(call.ids) for call in calls]).tolist()
    segments = [
        s for call, first in zip(calls, rows, strict=False) for s in _moved(call.segments, first)
    ]
    policies = [call.policy for call in calls if call.policy is not None]
    return Answered(
        Call(
            [row for call in calls for row in call.ids],
            segments,
            np.concatenate(policies) if policies else None,
        ),
        [
            joined(of_member, segments)
            for of_member in zip(*(e.questions for e in many), strict=True)
        ],
        [
            [row for answers in of_member for row in answers]
            for of_member in zip(*(e.answers for e in many), strict=True)
        ],
    )


def _moved(segments: Sequence[Segment], by: int) -> list[Segment]:
    moved = [copy(s) for s in segments]
    for s in moved:
        s.row += by
    return moved
