"""Answers of several models -> pairs of them, each model's against the baseline's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from cme_reward._keys import prompt_key
from cme_reward.conversation.messages import Prompt
from cme_reward.errors import InputError


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    prompt: Prompt
    model: str
    response: str

    @property
    def key(self) -> str:
        return prompt_key(self.prompt)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    prompt: Prompt
    model: str
    baseline: str
    response: str
    """The model's."""
    reference: str
    """The baseline's."""

    @property
    def longer_by(self) -> int:
        """Characters that the model's response has more than the baseline's."""
        return len(self.response) - len(self.reference)

    def shown(self, first: str) -> tuple[str, str]:
        """Both responses, with that of the model `first` as A."""
        if first == self.model:
            return self.response, self.reference
        return self.reference, self.response

    def drawn(self, seed: int) -> str:
        """The model that is shown first.

        A hash of the seed, the prompt and both names, so that neither the order of the lines nor
        which of the two is the baseline matters.
        """
        names = sorted((self.model, self.baseline))
        return names[int(digest(seed, prompt_key(self.prompt), names)[:8], 16) % 2]


def digest(*values: object) -> str:
    """A hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def pairs_of(answers: Sequence[Answer], baseline: str | None = None) -> list[Pair]:
    """Each model against the baseline, on every prompt that both answered.

    Args:
        answers: one at most of each model to each prompt.
        baseline: a model's name; by default the first answer's.

    Raises:
        InputError: where the baseline is not among the models, no other is, or they have no prompt
            in common.
    """
    models = list(dict.fromkeys(one.model for one in answers))
    baseline = baseline if baseline is not None or not models else models[0]
    if baseline not in models:
        there = ", ".join(models) or "none"
        raise InputError(f"--against {baseline!r} is no model of these files; they have {there}")
    if len(models) < 2:
        raise InputError(
            f"all answers are {baseline}'s; expected those of two models or more, told apart by "
            "the field `model` or, where lines have none, by their files' names"
        )
    known = {(one.model, one.key): one for one in answers}
    found = []
    for model in models:
        for answer in answers:
            reference = known.get((baseline, answer.key))
            if model != baseline and answer.model == model and reference is not None:
                found.append(
                    Pair(answer.prompt, model, baseline, answer.response, reference.response)
                )
    if not found:
        raise InputError(
            f"no other model answered a prompt of {baseline}'s; prompts are matched by their exact "
            "content"
        )
    return found
